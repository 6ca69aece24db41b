//! Where this rank's own tokens go, and where their results will stand when they come back.
//!
//! Everything follows from the ids and the placement, so the way back needs no counts of its own.

use crate::combine::Combine;
use crate::dispatch::Dispatch;
use crate::error::{Result, checked_add, checked_mul};
use crate::placement::Placement;
use crate::routing::Routing;

/// The routes of a call.
#[derive(Debug)]
pub(crate) struct Routes<'a> {
    topk: usize,
    dispatch: Dispatch,
    /// `[M, topk]`: the number of each slot's copy, -1 for an empty slot.
    copies: &'a [i32],
    /// `[M, topk]`: the rank of each slot's copy, -1 for an empty slot.
    ranks: &'a [i32],
    /// The tokens that go to each rank, rank after rank, in ascending order; what [`Dispatch::Routed`] sends.
    tokens: &'a [i32],
    /// `[R + 1]`: where each rank's part of `tokens` starts.
    first_token: Vec<usize>,
    /// `[R]`: slots whose copy is on each rank.
    slots: Vec<usize>,
}

impl<'a> Routes<'a> {
    /// Integers of space for calls of that many tokens.
    pub(crate) fn space_len(tokens: usize, topk: usize, ranks: usize) -> Result<usize> {
        let what = "integers of a call's routes";
        let slots = checked_mul(what, tokens, topk)?;
        checked_add(what, checked_mul(what, slots, 2)?, checked_mul(what, tokens, topk.min(ranks))?)
    }

    /// The routes of rank `rank`'s tokens; `routing` is over the placement's experts. Panics for less space than
    /// [`Routes::space_len`].
    pub(crate) fn new(
        routing: &Routing<'_>,
        placement: &Placement,
        rank: usize,
        dispatch: Dispatch,
        space: &'a mut [i32],
    ) -> Self {
        let (tokens, topk, ranks) = (routing.tokens(), routing.topk(), placement.ranks());
        let (copies, space) = space.split_at_mut(tokens * topk);
        let (rank_of_slot, list) = space.split_at_mut(tokens * topk);
        let (mut slots, mut counts) = (vec![0; ranks], vec![0; ranks]);
        for token in 0..tokens {
            for slot in 0..topk {
                let at = token * topk + slot;
                (copies[at], rank_of_slot[at]) = (-1, -1);
                let Some(expert) = routing.local_expert(token, slot) else { continue };
                let copy = placement.copy_for(expert, rank, token, slot);
                (copies[at], rank_of_slot[at]) = (copy.number as i32, copy.rank as i32);
                slots[copy.rank] += 1;
            }
            distinct(&rank_of_slot[token * topk..][..topk]).for_each(|rank| counts[rank] += 1);
        }
        let mut first_token = vec![0; ranks + 1];
        (0..ranks).for_each(|rank| first_token[rank + 1] = first_token[rank] + counts[rank]);
        let mut next = first_token.clone();
        for token in 0..tokens {
            for rank in distinct(&rank_of_slot[token * topk..][..topk]) {
                list[next[rank]] = token as i32;
                next[rank] += 1;
            }
        }
        let tokens = &list[..first_token[ranks]];
        Self { topk, dispatch, copies, ranks: rank_of_slot, tokens, first_token, slots }
    }

    /// `M`.
    pub(crate) fn own_tokens(&self) -> usize {
        self.copies.len() / self.topk
    }

    /// `[M, topk]`: the number of each slot's copy, -1 for an empty slot.
    pub(crate) fn copies(&self) -> &'a [i32] {
        self.copies
    }

    /// The tokens of [`Routes::tokens_to`], rank after rank.
    pub(crate) fn tokens(&self) -> &'a [i32] {
        self.tokens
    }

    /// The tokens with a slot on `rank`, in ascending order.
    pub(crate) fn tokens_to(&self, rank: usize) -> &'a [i32] {
        &self.tokens[self.first_token[rank]..self.first_token[rank + 1]]
    }

    /// `[R]`: token rows that go to each rank.
    pub(crate) fn rows_out(&self) -> Vec<usize> {
        (0..self.slots.len())
            .map(|rank| match self.dispatch {
                Dispatch::Gather => self.own_tokens(),
                Dispatch::Routed => self.tokens_to(rank).len(),
            })
            .collect()
    }

    /// `[R]`: rows that come back from each rank.
    pub(crate) fn rows_back(&self, combine: Combine) -> Vec<usize> {
        match combine {
            Combine::Rows => self.slots.clone(),
            Combine::Sums => self.rows_out(),
        }
    }

    /// Terms of a token's sum at home: its slots, or its ranks.
    pub(crate) fn terms(combine: Combine, topk: usize, ranks: usize) -> usize {
        match combine {
            Combine::Rows => topk,
            Combine::Sums => ranks,
        }
    }

    /// Writes where each term of a token's sum stands among all rows that come back, -1 for none: `[M, topk]` for
    /// rows, `[M, R]` for sums.
    pub(crate) fn write_inv_perm(&self, combine: Combine, out: &mut [i32]) {
        let ranks = self.slots.len();
        let mut next: Vec<i32> = Vec::with_capacity(ranks);
        let mut start = 0;
        for rows in self.rows_back(combine) {
            next.push(start);
            start += rows as i32;
        }
        match combine {
            Combine::Rows => {
                for (row, &rank) in out.iter_mut().zip(self.ranks) {
                    *row = -1;
                    if let Ok(rank) = usize::try_from(rank) {
                        *row = next[rank];
                        next[rank] += 1;
                    }
                }
            }
            Combine::Sums => {
                let tokens = out.chunks_exact_mut(ranks).zip(self.ranks.chunks_exact(self.topk));
                for (token, (rows, slots)) in tokens.enumerate() {
                    rows.fill(-1);
                    for rank in distinct(slots) {
                        match self.dispatch {
                            Dispatch::Gather => rows[rank] = next[rank] + token as i32,
                            Dispatch::Routed => {
                                rows[rank] = next[rank];
                                next[rank] += 1;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The different ranks among a token's slots, each where it comes first.
fn distinct(slots: &[i32]) -> impl Iterator<Item = usize> + '_ {
    slots.iter().enumerate().filter_map(|(at, &rank)| {
        let first = !slots[..at].contains(&rank);
        usize::try_from(rank).ok().filter(|_| first)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::MatrixRef;

    /// Three tokens of three slots over five experts, of which expert 4 stands on ranks 0 and 2; of rank 1.
    fn with_routes(dispatch: Dispatch, check: impl FnOnce(&Routes<'_>)) {
        let placement = Placement::from_lists(5, vec![vec![0, 4], vec![1, 3], vec![2, 4]]).unwrap();
        let ids = [0, 4, -1, 4, 2, 4, -7, -1, -1];
        let routing = Routing::new(MatrixRef::new(&ids[..], 3, 3).unwrap(), 5, None).unwrap();
        let mut space = vec![99; Routes::space_len(3, 3, 3).unwrap()];
        check(&Routes::new(&routing, &placement, 1, dispatch, &mut space));
    }

    #[test]
    fn routes_are_as_written_by_hand() {
        with_routes(Dispatch::Routed, |routes| {
            // Copies by number: 0 and 4 on rank 0 are 0 and 1, 1 and 3 are 2 and 3, 2 and 4 on rank 2 are 4 and 5. The
            // copy of expert 4 is picked by rank + token + slot: 2 and so rank 0, then 2 and 4: rank 0 both times.
            assert_eq!(routes.copies(), [0, 1, -1, 1, 4, 1, -1, -1, -1]);
            assert_eq!([0, 1, 2].map(|rank| routes.tokens_to(rank)), [&[0, 1][..], &[], &[1]]);
            assert_eq!((routes.rows_out(), routes.rows_back(Combine::Sums)), (vec![2, 0, 1], vec![2, 0, 1]));
            assert_eq!(routes.rows_back(Combine::Rows), [4, 0, 1]);
            let mut rows = [7; 9];
            routes.write_inv_perm(Combine::Rows, &mut rows);
            assert_eq!(rows, [0, 1, -1, 2, 4, 3, -1, -1, -1]);
            routes.write_inv_perm(Combine::Sums, &mut rows);
            assert_eq!(rows, [0, -1, -1, 1, -1, 2, -1, -1, -1]);
        });
        with_routes(Dispatch::Gather, |routes| {
            assert_eq!((routes.rows_out(), routes.rows_back(Combine::Sums)), (vec![3; 3], vec![3; 3]));
            let mut rows = [7; 9];
            routes.write_inv_perm(Combine::Sums, &mut rows);
            assert_eq!(rows, [0, -1, -1, 1, -1, 7, -1, -1, -1]);
        });
    }
}
