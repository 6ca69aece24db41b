//! What a routing makes ranks compute and send: counted, before anything runs.

use crate::combine::Combine;
use crate::dispatch::Dispatch;
use crate::error::{Error, Result};
use crate::placement::Placement;
use crate::routing::{Routing, TopkIds};

/// The rows that travel between ranks, and that each of them computes, for one call.
///
/// ```
/// use expertile::expert_parallel::Traffic;
/// use expertile::{Combine, Dispatch, MatrixRef, Placement};
/// let ids = [0, 1, 0, 3, 2, -1, 3, 2]; // two ranks of two tokens, two slots each
/// let traffic = Traffic::count(MatrixRef::new(&ids[..], 4, 2)?, &[2, 2], &Placement::linear(4, 2)?)?;
/// assert_eq!(traffic.rows(0), 3);
/// assert_eq!(traffic.dispatched(Dispatch::Routed, 0, 1), 1); // of rank 0's tokens one has an expert on rank 1
/// assert_eq!(traffic.combined(Combine::Rows, Dispatch::Routed, 1, 0), 1);
/// # Ok::<(), expertile::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traffic {
    /// `[R]`: tokens of each rank.
    own_tokens: Vec<usize>,
    /// `[R, R]`: tokens of a rank with a slot on another.
    tokens: Vec<usize>,
    /// `[R, R]`: their slots there.
    slots: Vec<usize>,
    /// `[copies]`: rows of each copy of each expert.
    rows_of_copy: Vec<u64>,
    /// `[R + 1]`: the number of each rank's first copy.
    first_copy: Vec<usize>,
}

impl Traffic {
    /// Of `topk_ids [T, topk]`, global, whose rows are rank 0's `tokens[0]` first, then rank 1's, and so on.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is a number for every rank; [`Error::Value`] unless they add up to `T`; as
    /// [`Routing::new`] for ids.
    pub fn count<'i>(topk_ids: impl Into<TopkIds<'i>>, tokens: &[usize], placement: &Placement) -> Result<Self> {
        let routing = Routing::new(topk_ids, placement.global_experts(), None)?;
        let ranks = placement.ranks();
        if tokens.len() != ranks {
            return Err(Error::shape("tokens", &[tokens.len()], format!("[{ranks}], one for each rank")));
        }
        let sum = tokens.iter().fold(0usize, |sum, &tokens| sum.saturating_add(tokens));
        if sum != routing.tokens() {
            return Err(Error::value("sum of tokens", sum, format!("{}, as topk_ids has rows", routing.tokens())));
        }
        let mut traffic = Self {
            own_tokens: tokens.to_vec(),
            tokens: vec![0; ranks * ranks],
            slots: vec![0; ranks * ranks],
            rows_of_copy: vec![0; placement.copies()],
            first_copy: placement.first_copies().to_vec(),
        };
        let mut first = 0;
        for (home, &tokens) in tokens.iter().enumerate() {
            (0..tokens).for_each(|token| traffic.add_token(&routing, placement, home, first, token));
            first += tokens;
        }
        Ok(traffic)
    }

    fn add_token(&mut self, routing: &Routing<'_>, placement: &Placement, home: usize, first: usize, token: usize) {
        let (ranks, topk) = (self.own_tokens.len(), routing.topk());
        let copy = |slot: usize| {
            let expert = routing.local_expert(first + token, slot)?;
            Some(placement.copy_for(expert, home, token, slot))
        };
        for slot in 0..topk {
            let Some(to) = copy(slot) else { continue };
            self.rows_of_copy[to.number] += 1;
            self.slots[home * ranks + to.rank] += 1;
            if !(0..slot).filter_map(copy).any(|earlier| earlier.rank == to.rank) {
                self.tokens[home * ranks + to.rank] += 1;
            }
        }
    }

    /// `R`.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.own_tokens.len()
    }

    /// Rows that a rank's experts compute; panics for `rank >= R`.
    #[must_use]
    pub fn rows(&self, rank: usize) -> u64 {
        self.rows_of_experts(rank).iter().sum()
    }

    /// Rows of each of a rank's experts, in the order of their local ids; panics for `rank >= R`.
    #[must_use]
    pub fn rows_of_experts(&self, rank: usize) -> &[u64] {
        &self.rows_of_copy[self.first_copy[rank]..self.first_copy[rank + 1]]
    }

    /// Token rows that go from a rank to another; panics past the ranks.
    #[must_use]
    pub fn dispatched(&self, dispatch: Dispatch, from: usize, to: usize) -> usize {
        assert!(to < self.ranks());
        match dispatch {
            Dispatch::Gather => self.own_tokens[from],
            Dispatch::Routed => self.tokens[from * self.ranks() + to],
        }
    }

    /// Rows that come back from a rank to a token's own; panics past the ranks.
    #[must_use]
    pub fn combined(&self, combine: Combine, dispatch: Dispatch, from: usize, to: usize) -> usize {
        match combine {
            Combine::Rows => self.slots[to * self.ranks() + from],
            Combine::Sums => self.dispatched(dispatch, to, from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expert_parallel::routes::Routes;
    use crate::matrix::MatrixRef;
    use expertile_testkit::{Pattern, Random};

    /// What is counted here is what a call's routes send, for every rank and both ways.
    #[test]
    fn counts_are_those_of_the_routes_that_calls_take() {
        let mut random = Random::new(5);
        for _ in 0..200 {
            let experts = 1 + random.below(12);
            let ranks = 1 + random.below(experts);
            let redundant = random.below(experts * (ranks - 1) + 1);
            let loads: Vec<u64> = (0..experts).map(|_| random.draw() % 50).collect();
            let placement = Placement::balanced(&loads, ranks, redundant).unwrap();
            let tokens: Vec<usize> = (0..ranks).map(|_| random.below(6)).collect();
            let (all, topk) = (tokens.iter().sum(), 1 + random.below(4));
            let ids = Pattern::Skewed.ids(&mut random, [all, topk], experts, 0);
            let traffic = Traffic::count(MatrixRef::new(&ids[..], all, topk).unwrap(), &tokens, &placement).unwrap();
            let mut first = 0;
            for (home, &count) in tokens.iter().enumerate() {
                let mine = MatrixRef::new(&ids[first * topk..], count, topk).unwrap();
                let routing = Routing::new(mine, experts, None).unwrap();
                first += count;
                for dispatch in Dispatch::ALL {
                    let mut space = vec![0; Routes::space_len(count, topk, ranks).unwrap()];
                    let routes = Routes::new(&routing, &placement, home, dispatch, &mut space);
                    let out: Vec<usize> = (0..ranks).map(|to| traffic.dispatched(dispatch, home, to)).collect();
                    assert_eq!(out, routes.rows_out());
                    for combine in Combine::ALL {
                        let back = |from| traffic.combined(combine, dispatch, from, home);
                        assert_eq!((0..ranks).map(back).collect::<Vec<_>>(), routes.rows_back(combine));
                    }
                }
            }
            let live = ids.iter().filter(|&&id| id >= 0).count();
            assert_eq!((0..ranks).map(|rank| traffic.rows(rank)).sum::<u64>(), live as u64);
            assert_eq!(traffic.rows_of_experts(0).len(), placement.experts(0).len());
        }
    }

    #[test]
    fn tokens_that_do_not_add_up_are_refused() {
        let (ids, placement) = ([0i64; 4], Placement::linear(4, 2).unwrap());
        let refuse = |tokens: &[usize], start: &str| {
            let ids = MatrixRef::new(&ids[..], 4, 1).unwrap();
            let error = Traffic::count(ids, tokens, &placement).unwrap_err().to_string();
            assert!(error.starts_with(start), "{error}");
        };
        refuse(&[4], "tokens has shape [1], expected [2], one for each rank");
        refuse(&[1, 2], "sum of tokens is 3, expected 4");
        refuse(&[usize::MAX, 1], "sum of tokens is 18446744073709551615");
    }
}
