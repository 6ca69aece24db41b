//! What ranks say when one of them does something wrong.

use super::Rank;
use crate::error::Result;
use crate::output;
use crate::preset::RoutingName;
use expertile::Combine;
use expertile::cuda::measure::{ExpertParallelBench, HostInputs};
use std::time::Instant;

/// What the last rank does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::commands::bench::exchange) enum Fault {
    /// It brings an id past the experts.
    BadId,
    /// It never comes to a call.
    Late,
    /// It is killed between two calls.
    Killed,
}

const TOKENS: usize = 8;

impl Rank<'_> {
    /// Some good calls, then the fault; tells what this rank got, and when.
    pub(super) fn commit(&self, fault: Fault) -> Result<()> {
        let last = self.exchange.rank() + 1 == self.exchange.ranks();
        // The way that is asked for; gather where none is.
        let dispatch = self.args.placement.ways().0[0];
        for link in self.args.gpus.links() {
            let layer = self.layer(link, dispatch, Combine::Rows, TOKENS)?;
            let inputs = self.inputs(RoutingName::Uniform, TOKENS)?;
            let good = ExpertParallelBench::new(&layer, &inputs.own()?, TOKENS)?;
            (0..3).try_for_each(|_| good.run())?;
            let name = layer.link().name();
            let tell = |what: &str, result: expertile::Result<()>, started: Instant| {
                let said = result.map_or_else(|error| error.to_string(), |()| "no error".into());
                let (rank, seconds) = (self.exchange.rank(), started.elapsed().as_secs_f64());
                output::print(&format!("{name}, {dispatch}, {what}: rank {rank} says after {seconds:.3} s: {said}\n"))
            };
            let started = Instant::now();
            match fault {
                Fault::BadId => {
                    let mut ids = inputs.own()?.topk_ids.to_vec();
                    if last {
                        ids[2] = 1 << 20;
                    }
                    let bad = HostInputs { topk_ids: &ids, ..inputs.own()? };
                    tell("a bad id", ExpertParallelBench::new(&layer, &bad, TOKENS)?.run(), started)?;
                    tell("the call after it", good.run(), started)?;
                }
                Fault::Killed if last => std::process::abort(),
                Fault::Late if last => std::thread::sleep(layer.time_limit() * 4),
                Fault::Killed | Fault::Late => {
                    tell("a rank that does not come", good.run(), started)?;
                    tell("the call after it", good.run(), Instant::now())?;
                    // The exchange is broken, too: nobody is left to try another link with.
                    return Ok(());
                }
            }
            if fault != Fault::BadId {
                return Ok(());
            }
        }
        self.exchange.meet()?;
        Ok(())
    }
}
