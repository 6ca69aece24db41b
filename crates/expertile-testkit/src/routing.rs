//! Which experts tokens go to, and where experts are.

use crate::Random;

/// A map from `global` ids to local experts: each of the `local` ones once, -1 elsewhere.
///
/// # Panics
/// If there are more local experts than global ids.
pub fn expert_map(random: &mut Random, global: usize, local: usize) -> Vec<i32> {
    assert!(local <= global, "local is {local}, expected at most {global}");
    let mut map: Vec<i32> = (0..global).map(|id| if id < local { id as i32 } else { -1 }).collect();
    random.shuffle(&mut map);
    map
}

/// How tokens choose experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Distinct experts, evenly; slots beyond the number of experts are empty.
    Even,
    /// Half of all slots on a few experts, repeats within a token, some slots empty.
    Skewed,
    /// Every slot on one expert.
    One,
    /// No slot at all.
    Empty,
}

impl Pattern {
    /// Ids `[tokens, topk]` below `experts`, or negative for an empty slot. The crowd of [`Pattern::Skewed`] is at
    /// `busy` and the next two, that of [`Pattern::One`] at `busy` alone.
    pub fn ids(self, random: &mut Random, [tokens, topk]: [usize; 2], experts: usize, busy: usize) -> Vec<i64> {
        let mut order: Vec<i64> = (0..experts as i64).collect();
        let mut ids = Vec::with_capacity(tokens * topk);
        for _ in 0..tokens {
            for slot in 0..topk {
                ids.push(match self {
                    Self::Even if slot < experts => {
                        order.swap(slot, slot + random.below(experts - slot));
                        order[slot]
                    }
                    Self::Even | Self::Empty => -1 - slot as i64,
                    Self::One => busy as i64,
                    Self::Skewed if random.one_in(5) => -1,
                    Self::Skewed if random.one_in(2) => ((busy + random.below(3)) % experts) as i64,
                    Self::Skewed => random.below(experts) as i64,
                });
            }
        }
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_every_local_expert_once() {
        for (global, local) in [(1, 1), (40, 16), (256, 32), (5, 5), (3, 0)] {
            let map = expert_map(&mut Random::new(global as u64), global, local);
            assert_eq!(map.len(), global);
            let mut found: Vec<i32> = map.into_iter().filter(|&expert| expert != -1).collect();
            found.sort_unstable();
            assert!(found.into_iter().eq(0..local as i32));
        }
    }

    #[test]
    fn even_ids_are_distinct_within_a_token_and_reach_every_expert_about_as_often() {
        let ids = Pattern::Even.ids(&mut Random::new(4), [2000, 8], 11, 0);
        let mut counts = [0; 11];
        for token in ids.chunks(8) {
            let mut sorted = token.to_vec();
            sorted.sort_unstable();
            assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]), "{token:?}");
            token.iter().for_each(|&id| counts[id as usize] += 1);
        }
        assert!(counts.iter().all(|count| (1350..1560).contains(count)), "{counts:?}");
        let more = Pattern::Even.ids(&mut Random::new(5), [1, 4], 2, 0);
        assert!(more[..2] == [0, 1] || more[..2] == [1, 0]);
        assert_eq!(more[2..], [-3, -4]);
    }

    #[test]
    fn skewed_ids_crowd_repeat_and_leave_slots_empty() {
        let ids = Pattern::Skewed.ids(&mut Random::new(6), [1000, 4], 64, 63);
        let share = |is: &dyn Fn(&i64) -> bool| ids.iter().filter(|id| is(id)).count() as f64 / ids.len() as f64;
        assert!((share(&|&id| id < 0) - 0.2).abs() < 0.03);
        assert!((share(&|id| [63, 0, 1].contains(id)) - 0.42).abs() < 0.04);
        assert!(ids.chunks(4).any(|token| token[0] >= 0 && token[1..].contains(&token[0])));
        assert!(ids.iter().all(|&id| (-1..64).contains(&id)));
    }
}
