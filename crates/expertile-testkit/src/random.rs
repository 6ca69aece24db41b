//! The one generator.

/// Random numbers, the same for the same seed on every machine (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for every seed, neighbouring seeds included.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer in `0..limit`.
    ///
    /// # Panics
    /// If `limit` is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.draw() % limit as u64) as usize
    }

    /// True once in `count` times.
    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    /// One element of a list.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len())]
    }

    /// Puts a list in random order.
    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }

    /// Evenly spread in [-1, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.draw() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// Roughly normal, standard deviation 1.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() / 2.0
    }

    /// Of either sign, spread over many magnitudes.
    pub fn spread(&mut self) -> f32 {
        0.5 * self.uniform() * 2f32.powi(self.below(12) as i32 - 6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_that_of_splitmix64() {
        // The reference implementation's first numbers for the seed 1234567.
        let mut random = Random::new(1_234_567);
        let expected = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423u64];
        assert_eq!([(); 3].map(|()| random.draw()), expected);
    }

    #[test]
    fn numbers_have_the_mean_and_variance_that_their_names_promise() {
        let mut random = Random::new(1);
        let mut moments = |draw: fn(&mut Random) -> f32| {
            let values: Vec<f64> = (0..20_000).map(|_| f64::from(draw(&mut random))).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            (mean, values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64)
        };
        let (mean, variance) = moments(Random::uniform);
        assert!(mean.abs() < 0.02 && (variance - 1.0 / 3.0).abs() < 0.01, "uniform: {mean}, {variance}");
        let (mean, variance) = moments(Random::normal);
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03, "normal: {mean}, {variance}");
        let mut random = Random::new(2);
        assert!((0..20_000).all(|_| (-1.0..1.0).contains(&random.uniform()) && random.spread().abs() < 16.0));
    }

    #[test]
    fn a_shuffled_list_keeps_its_elements_and_loses_its_order() {
        let mut list: Vec<usize> = (0..100).collect();
        Random::new(3).shuffle(&mut list);
        assert!(list.windows(2).any(|pair| pair[0] > pair[1]));
        list.sort_unstable();
        assert!(list.into_iter().eq(0..100));
    }
}
