//! Which rank holds which expert.
//!
//! With expert parallelism each of `R` ranks holds some of the `G` experts. An expert may stand on several ranks
//! (replicas, "redundant experts"): its *copies* hold the same weights, and each of its slots goes to one of them.
//! Copies are numbered rank by rank, in the order of each rank's list: this number, and not the expert's id, is what
//! travels with a token, so that a rank knows its own slots by one look into [`Placement::copy_map`]. A placement is
//! plain data; it knows no backend and no transport.

mod balance;

use crate::error::{Error, Result, checked_add};
use std::fmt;

/// One copy of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExpertCopy {
    /// The rank that holds it.
    pub rank: usize,
    /// Its local id there.
    pub local: usize,
    /// Its number among all copies of all experts.
    pub number: usize,
}

/// Which rank holds which of `G` experts.
///
/// ```
/// use expertile::Placement;
/// let placement = Placement::linear(10, 4)?; // 3, 3, 2 and 2 experts
/// assert_eq!(placement.experts(1), [3, 4, 5]);
/// assert_eq!(placement.owner(6), (2, 0));
/// assert_eq!(placement.expert_map(3), [-1, -1, -1, -1, -1, -1, -1, -1, 0, 1]);
/// # Ok::<(), expertile::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// `[R]`: each rank's experts, in the order of their local ids.
    experts: Vec<Vec<usize>>,
    /// `[G]`: each expert's copies, in the order of ranks.
    copies: Vec<Vec<ExpertCopy>>,
    /// `[R + 1]`: the number of each rank's first copy.
    first_copy: Vec<usize>,
}

impl Placement {
    /// Neighbouring ids together, as vLLM's `linear` does: where `R` does not divide `G`, the first `G % R` ranks hold
    /// one expert more.
    ///
    /// # Errors
    /// [`Error::Value`] if `ranks` is 0 or above `global_experts` (every rank holds at least one expert), or if there
    /// are more experts than i32 counts.
    pub fn linear(global_experts: usize, ranks: usize) -> Result<Self> {
        require_ranks(global_experts, ranks)?;
        let (each, more) = (global_experts / ranks, global_experts % ranks);
        let start = |rank: usize| rank * each + rank.min(more);
        Self::from_lists(global_experts, (0..ranks).map(|rank| (start(rank)..start(rank + 1)).collect()).collect())
    }

    /// Expert `g` on rank `g % R`, as vLLM's `round_robin` does.
    ///
    /// # Errors
    /// As [`Placement::linear`].
    pub fn round_robin(global_experts: usize, ranks: usize) -> Result<Self> {
        require_ranks(global_experts, ranks)?;
        let list = |rank: usize| (rank..global_experts).step_by(ranks).collect();
        Self::from_lists(global_experts, (0..ranks).map(list).collect())
    }

    /// Each rank's experts, in the order of their local ids. An expert may stand on several ranks.
    ///
    /// # Errors
    /// [`Error::Value`] if there are no ranks or no experts, or more copies than i32 counts; [`Error::Placement`] for
    /// a rank without experts, an id past `global_experts`, and an expert that stands on no rank or on one rank twice.
    pub fn from_lists(global_experts: usize, experts: Vec<Vec<usize>>) -> Result<Self> {
        require_experts(global_experts)?;
        if experts.is_empty() {
            return Err(Error::value("ranks", 0, "at least 1"));
        }
        let mut copies: Vec<Vec<ExpertCopy>> = vec![Vec::new(); global_experts];
        let mut first_copy = vec![0];
        let mut number = 0usize;
        for (rank, list) in experts.iter().enumerate() {
            if list.is_empty() {
                return Err(Error::placement(format!("no expert on rank {rank}"), "at least one on every rank"));
            }
            for (local, &expert) in list.iter().enumerate() {
                let Some(copies) = copies.get_mut(expert) else {
                    let expected = format!("an id below {global_experts}");
                    return Err(Error::placement(format!("expert {expert} on rank {rank}"), expected));
                };
                if copies.last().is_some_and(|copy| copy.rank == rank) {
                    let actual = format!("expert {expert} twice on rank {rank}");
                    return Err(Error::placement(actual, "a copy of an expert on a rank at most once"));
                }
                copies.push(ExpertCopy { rank, local, number });
                number = checked_add("copies of experts", number, 1)?;
            }
            first_copy.push(number);
        }
        if let Some(expert) = copies.iter().position(Vec::is_empty) {
            return Err(Error::placement(format!("expert {expert} on no rank"), "every expert on at least one"));
        }
        if i32::try_from(number).is_err() {
            return Err(Error::value("copies of experts", number, format!("at most {}", i32::MAX)));
        }
        Ok(Self { experts, copies, first_copy })
    }

    /// Experts where the load is: `redundant` copies more than there are experts, the busiest experts copied first,
    /// then the heaviest copies first onto the least loaded rank. Ranks hold as many copies as each other (but for the
    /// remainder), as equal memory asks for. `loads [G]` are rows of each expert, measured or expected.
    ///
    /// # Errors
    /// [`Error::Value`] as [`Placement::linear`], and for more copies than each rank could hold one of every expert.
    pub fn balanced(loads: &[u64], ranks: usize, redundant: usize) -> Result<Self> {
        require_ranks(loads.len(), ranks)?;
        let most = loads.len().saturating_mul(ranks - 1);
        if redundant > most {
            return Err(Error::value("redundant", redundant, format!("at most {most}, every expert on every rank")));
        }
        Self::from_lists(loads.len(), balance::balance(loads, ranks, redundant))
    }

    /// `R`.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.experts.len()
    }

    /// `G`.
    #[must_use]
    pub fn global_experts(&self) -> usize {
        self.copies.len()
    }

    /// Copies of all experts on all ranks: `G` without replicas.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.first_copy[self.ranks()]
    }

    /// `[R + 1]`: the number of each rank's first copy.
    pub(crate) fn first_copies(&self) -> &[usize] {
        &self.first_copy
    }

    /// A rank's experts, in the order of their local ids; panics for `rank >= R`.
    #[must_use]
    pub fn experts(&self, rank: usize) -> &[usize] {
        &self.experts[rank]
    }

    /// An expert's copies, in the order of ranks; panics for `expert >= G`.
    #[must_use]
    pub fn copies_of(&self, expert: usize) -> &[ExpertCopy] {
        &self.copies[expert]
    }

    /// The rank that holds an expert, and its local id there: of the first copy, where there are several. Panics for
    /// `expert >= G`.
    #[must_use]
    pub fn owner(&self, expert: usize) -> (usize, usize) {
        let copy = self.copies[expert][0];
        (copy.rank, copy.local)
    }

    /// The copy that a slot of an expert goes to: copies take turns by rank, token and slot. All of them hold the same
    /// weights, so which one it is never changes a result. Panics for `expert >= G`.
    #[must_use]
    #[inline]
    pub fn copy_for(&self, expert: usize, rank: usize, token: usize, slot: usize) -> ExpertCopy {
        match &self.copies[expert][..] {
            [only] => *only,
            copies => copies[rank.wrapping_add(token).wrapping_add(slot) % copies.len()],
        }
    }

    /// `[G]`: global id to local id of a rank, -1 for an expert that is not there. Panics for `rank >= R`.
    #[must_use]
    pub fn expert_map(&self, rank: usize) -> Vec<i32> {
        let mut map = vec![-1; self.global_experts()];
        self.experts[rank].iter().enumerate().for_each(|(local, &expert)| map[expert] = local as i32);
        map
    }

    /// `[copies]`: a copy's number to the local id of a rank, -1 for a copy that is not there. Panics for `rank >= R`.
    #[must_use]
    pub fn copy_map(&self, rank: usize) -> Vec<i32> {
        let mut map = vec![-1; self.copies()];
        let mine = self.first_copy[rank]..self.first_copy[rank + 1];
        map[mine].iter_mut().enumerate().for_each(|(local, entry)| *entry = local as i32);
        map
    }

    /// Rows that each rank has if expert `g` has `loads[g]` of them, copies sharing evenly.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `loads` is `[G]`.
    pub fn rank_loads(&self, loads: &[u64]) -> Result<Vec<f64>> {
        if loads.len() != self.global_experts() {
            return Err(Error::shape("loads", &[loads.len()], format!("[{}]", self.global_experts())));
        }
        let share = |&expert: &usize| loads[expert] as f64 / self.copies[expert].len() as f64;
        Ok(self.experts.iter().map(|list| list.iter().map(share).sum()).collect())
    }

    /// The same for the same placement, other for almost any other: what ranks compare.
    #[must_use]
    pub(crate) fn fingerprint(&self) -> u64 {
        let words = self.experts.iter().flat_map(|list| [list.len()].into_iter().chain(list.iter().copied()));
        words.fold(self.global_experts() as u64, |hash, word| (hash ^ word as u64).wrapping_mul(0x100_0000_01b3))
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (fewest, most) = self
            .experts
            .iter()
            .fold((usize::MAX, 0), |(fewest, most), list| (fewest.min(list.len()), most.max(list.len())));
        let (experts, ranks) = (self.global_experts(), self.ranks());
        write!(f, "{experts} experts on {ranks} ranks, {fewest} to {most} each")?;
        match self.copies() - experts {
            0 => Ok(()),
            redundant => write!(f, ", {redundant} redundant"),
        }
    }
}

fn require_experts(global_experts: usize) -> Result<()> {
    if global_experts == 0 || i32::try_from(global_experts).is_err() {
        return Err(Error::value("global_experts", global_experts, format!("1 to {}", i32::MAX)));
    }
    Ok(())
}

fn require_ranks(global_experts: usize, ranks: usize) -> Result<()> {
    require_experts(global_experts)?;
    if ranks == 0 || ranks > global_experts {
        let expected = format!("1 to {global_experts}, an expert for every rank");
        return Err(Error::value("ranks", ranks, expected));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_expert_has_an_owner_that_knows_it() {
        for experts in 1..=17 {
            for ranks in 1..=experts {
                let made = [Placement::linear(experts, ranks), Placement::round_robin(experts, ranks)];
                for placement in made.map(Result::unwrap) {
                    assert_eq!((placement.copies(), placement.ranks()), (experts, ranks));
                    for expert in 0..experts {
                        let (rank, local) = placement.owner(expert);
                        assert_eq!(placement.experts(rank)[local], expert);
                        assert_eq!(placement.expert_map(rank)[expert], local as i32);
                        assert_eq!(placement.copy_for(expert, 3, 5, 7), placement.copies_of(expert)[0]);
                    }
                    let sizes: Vec<usize> = (0..ranks).map(|rank| placement.experts(rank).len()).collect();
                    assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
                    assert!(sizes.is_sorted_by(|a, b| a >= b), "{sizes:?}");
                }
            }
        }
        assert_eq!(Placement::linear(7, 3).unwrap().experts(1), [3, 4]);
        assert_eq!(Placement::round_robin(7, 3).unwrap().experts(0), [0, 3, 6]);
    }

    #[test]
    fn copies_take_turns_and_are_numbered_by_rank() {
        let placement = Placement::from_lists(3, vec![vec![2, 0], vec![1, 2], vec![2]]).unwrap();
        let copy = |rank, local, number| ExpertCopy { rank, local, number };
        assert_eq!(placement.copies_of(2), [copy(0, 0, 0), copy(1, 1, 3), copy(2, 0, 4)]);
        assert_eq!(placement.copy_map(1), [-1, -1, 0, 1, -1]);
        assert_eq!(placement.expert_map(1), [-1, 0, 1]);
        assert_eq!([0, 1, 2, 3].map(|token| placement.copy_for(2, 1, token, 0).rank), [1, 2, 0, 1]);
        assert_eq!(placement.rank_loads(&[5, 7, 30]).unwrap(), [15.0, 17.0, 10.0]);
        assert_eq!(placement.to_string(), "3 experts on 3 ranks, 1 to 2 each, 2 redundant");
    }

    #[test]
    fn placements_that_differ_have_other_fingerprints() {
        let one = Placement::linear(8, 2).unwrap();
        for other in [
            Placement::round_robin(8, 2).unwrap(),
            Placement::linear(8, 4).unwrap(),
            Placement::linear(9, 2).unwrap(),
            Placement::from_lists(8, vec![vec![1, 0, 2, 3], vec![4, 5, 6, 7]]).unwrap(),
        ] {
            assert_ne!(one.fingerprint(), other.fingerprint());
        }
        assert_eq!(one.fingerprint(), Placement::linear(8, 2).unwrap().fingerprint());
    }
}
