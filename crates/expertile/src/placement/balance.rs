//! Greedy balancing: which experts get a copy more, and which rank a copy goes to.
//!
//! The two steps of DeepSeek's EPLB: the expert with the highest load per copy gets the next one; copies are packed
//! heaviest first onto the least loaded rank that has room. Here two copies of one expert never share a rank, which
//! would save nothing.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Each rank's experts, for `1 <= ranks <= loads.len()` and `redundant <= loads.len() * (ranks - 1)`.
pub(super) fn balance(loads: &[u64], ranks: usize, redundant: usize) -> Vec<Vec<usize>> {
    let copies = copies(loads, ranks, redundant);
    let total: usize = copies.iter().sum();
    let mut ranks = Packing {
        room: (0..ranks).map(|rank| total / ranks + usize::from(rank < total % ranks)).collect(),
        load: vec![0.0; ranks],
        experts: vec![Vec::new(); ranks],
    };
    let share = |expert: usize| loads[expert] as f64 / copies[expert] as f64;
    let mut heaviest_first: Vec<usize> = (0..loads.len()).collect();
    heaviest_first.sort_by(|&a, &b| share(b).total_cmp(&share(a)).then(a.cmp(&b)));
    let (several, single): (Vec<usize>, Vec<usize>) = heaviest_first.into_iter().partition(|&e| copies[e] > 1);
    for expert in several {
        ranks.place_apart(expert, copies[expert], share(expert));
    }
    for expert in single {
        ranks.place(expert, share(expert));
    }
    ranks.experts.iter_mut().for_each(|list| list.sort_unstable());
    ranks.experts
}

/// `[G]`: copies of each expert, at most one a rank.
fn copies(loads: &[u64], ranks: usize, redundant: usize) -> Vec<usize> {
    let mut copies = vec![1; loads.len()];
    if ranks == 1 {
        return copies;
    }
    let first = |(expert, &load): (usize, &u64)| Candidate { expert, load, copies: 1 };
    let mut open: BinaryHeap<Candidate> = loads.iter().enumerate().map(first).collect();
    for _ in 0..redundant {
        let Some(busiest) = open.pop() else { break };
        let more = Candidate { copies: busiest.copies + 1, ..busiest };
        copies[busiest.expert] = more.copies;
        if more.copies < ranks {
            open.push(more);
        }
    }
    copies
}

/// An expert that may get a copy more. The largest is the busiest: that of the most load per copy, then of the lowest
/// id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Candidate {
    expert: usize,
    load: u64,
    copies: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // `a / m` against `b / n` without rounding.
        let [a, b] = [(self, other), (other, self)].map(|(x, y)| u128::from(x.load) * y.copies as u128);
        a.cmp(&b).then(other.expert.cmp(&self.expert))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Ranks while they fill.
struct Packing {
    room: Vec<usize>,
    load: Vec<f64>,
    experts: Vec<Vec<usize>>,
}

impl Packing {
    /// Copies on as many different ranks, those with the most room first. Room so never differs by more than one from
    /// rank to rank, and the last expert of several copies still finds as many ranks as it needs.
    fn place_apart(&mut self, expert: usize, copies: usize, share: f64) {
        let mut ranks: Vec<usize> = (0..self.room.len()).collect();
        ranks.sort_by(|&a, &b| {
            Reverse(self.room[a]).cmp(&Reverse(self.room[b])).then(self.load[a].total_cmp(&self.load[b]))
        });
        ranks[..copies].iter().for_each(|&rank| self.put(expert, rank, share));
    }

    /// One copy on the least loaded rank with room.
    fn place(&mut self, expert: usize, share: f64) {
        let open = (0..self.room.len()).filter(|&rank| self.room[rank] > 0);
        let rank = open.min_by(|&a, &b| self.load[a].total_cmp(&self.load[b]));
        self.put(expert, rank.expect("as much room as copies"), share);
    }

    fn put(&mut self, expert: usize, rank: usize, share: f64) {
        self.room[rank] -= 1;
        self.load[rank] += share;
        self.experts[rank].push(expert);
    }
}

#[cfg(test)]
mod tests {
    use crate::Placement;
    use expertile_testkit::Random;

    fn most_over_mean(placement: &Placement, loads: &[u64]) -> f64 {
        let rows = placement.rank_loads(loads).unwrap();
        rows.iter().copied().fold(0.0, f64::max) * rows.len() as f64 / rows.iter().sum::<f64>()
    }

    #[test]
    fn any_loads_and_any_number_of_copies_make_a_valid_placement_of_even_sizes() {
        let mut random = Random::new(1);
        for _ in 0..2000 {
            let experts = 1 + random.below(20);
            let ranks = 1 + random.below(experts);
            let redundant = random.below(experts * (ranks - 1) + 1);
            let loads: Vec<u64> =
                (0..experts).map(|_| [0, 1, random.draw() % 100, u64::MAX][random.below(4)]).collect();
            let placement = Placement::balanced(&loads, ranks, redundant).unwrap();
            assert_eq!(placement.copies(), experts + redundant);
            let sizes: Vec<usize> = (0..ranks).map(|rank| placement.experts(rank).len()).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
        }
    }

    #[test]
    fn packing_evens_loads_out_and_copies_do_where_one_expert_is_too_heavy() {
        let loads: Vec<u64> = (0..64).map(|expert| (100_000.0 / (expert as f64 + 1.0).sqrt()) as u64).collect();
        let linear = most_over_mean(&Placement::linear(64, 8).unwrap(), &loads);
        let packed = most_over_mean(&Placement::balanced(&loads, 8, 0).unwrap(), &loads);
        assert!(linear > 2.0 && packed < 1.15, "{linear} {packed}");
        // Half of all rows on one expert: packing alone cannot go below half of them on one rank.
        let loads: Vec<u64> = (0..32).map(|expert| if expert == 7 { 3100 } else { 100 }).collect();
        let packed = most_over_mean(&Placement::balanced(&loads, 8, 0).unwrap(), &loads);
        let copied = Placement::balanced(&loads, 8, 8).unwrap();
        assert!(packed > 3.9 && most_over_mean(&copied, &loads) < 1.2);
        assert!(copied.copies_of(7).len() > 4);
    }

    #[test]
    fn the_expert_with_most_rows_per_copy_is_copied_next() {
        let of = |redundant| super::copies(&[60, 100, 30, 100], 3, redundant);
        assert_eq!(of(0), [1, 1, 1, 1]);
        assert_eq!(of(1), [1, 2, 1, 1]);
        assert_eq!(of(3), [2, 2, 1, 2]);
        assert_eq!(of(4), [2, 3, 1, 2]);
        // Expert 1 stands on every rank: the next is 3, then 2 and 0, which have 30 rows a copy, the lower one first.
        assert_eq!(of(5), [2, 3, 1, 3]);
        assert_eq!(of(6), [3, 3, 1, 3]);
        assert_eq!(of(8), [3, 3, 3, 3]);
        assert_eq!(super::copies(&[5, 5], 1, 0), [1, 1]);
    }

    #[test]
    fn more_copies_than_places_are_refused() {
        let error = Placement::balanced(&[1, 2, 3], 2, 4).unwrap_err().to_string();
        assert_eq!(error, "redundant is 4, expected at most 3, every expert on every rank");
        let error = Placement::balanced(&[1], 2, 0).unwrap_err().to_string();
        assert_eq!(error, "ranks is 2, expected 1 to 1, an expert for every rank");
    }
}
