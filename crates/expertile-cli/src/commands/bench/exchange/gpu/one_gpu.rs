//! Ranks that share one GPU: what the kernels of dispatch and combine cost where nothing goes over a wire.

use super::{Args, LinkName, Rank};
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::preset::RoutingName;
use crate::report::format;
use expertile::cuda::measure::{ExpertParallelBench, SharedDeviceTimes};
use expertile::cuda::{Device, ExpertParallelLayer};
use expertile::exchange::Threads;
use serde::Serialize;
use std::sync::Arc;

#[derive(Debug, Serialize)]
struct Report {
    source: String,
    #[serde(flatten)]
    gpu: Gpu,
    ranks: usize,
    sizes: Vec<Size>,
}

/// One way, for one number of tokens; a rank's share of all ranks' time.
#[derive(Debug, Serialize)]
struct Size {
    routing: &'static str,
    tokens_per_rank: usize,
    dispatch: &'static str,
    combine: &'static str,
    dispatch_seconds: f64,
    combine_seconds: f64,
    /// Of a call with its parts apart, as here: one more than of a call.
    launches: usize,
    workspace_bytes: usize,
    window_bytes: usize,
}

pub(super) fn run(args: &Args, ranks: usize) -> Result<()> {
    let options = &args.gpus;
    if options.link.iter().any(|&link| link != LinkName::Mapped) {
        return Err(Error::usage("--link is nccl, expected mapped with --one-gpu: NCCL takes one rank a GPU"));
    }
    let others = [
        ("--same", options.same.is_some()),
        ("--fault", options.fault.is_some()),
        ("--link-gbs", options.link_gbs.is_some()),
    ];
    if let Some((option, _)) = others.into_iter().find(|(_, given)| *given) {
        return Err(Error::usage(format!("{option} does not go with --one-gpu")));
    }
    let device = Device::open(0)?;
    let ranks = on_threads(Threads::new(ranks, args.placement.limit()?)?, |exchange| {
        Rank::new(args, Arc::new(exchange), device.clone(), &[LinkName::Mapped])
    })?;
    let capacity = args.tokens.iter().copied().max().unwrap_or(1);
    let (dispatches, combines) = args.placement.ways();
    let mut sizes = Vec::new();
    for &combine in &combines {
        for &dispatch in &dispatches {
            let layers =
                on_threads(ranks.iter().collect(), |rank| rank.layer(LinkName::Mapped, dispatch, combine, capacity))?;
            for routing in options.routings() {
                for &tokens in &args.tokens {
                    sizes.push(measure(&ranks, &layers, (routing, tokens))?);
                }
            }
        }
    }
    let report = Report { source: args.preset.name(), gpu: device.info().into(), ranks: ranks.len(), sizes };
    args.report.tell(&report, Report::text)
}

/// A thread for each of them: ranks meet while they are prepared.
fn on_threads<I: Send, T: Send>(of: Vec<I>, work: impl Fn(I) -> Result<T> + Sync) -> Result<Vec<T>> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = of.into_iter().map(|one| scope.spawn(move || work(one))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank does not panic")).collect()
    })
}

fn measure(
    ranks: &[Rank<'_>],
    layers: &[ExpertParallelLayer],
    (routing, tokens): (RoutingName, usize),
) -> Result<Size> {
    let benches: Vec<_> = ranks
        .iter()
        .zip(layers)
        .map(|(rank, layer)| {
            let inputs = rank.inputs(routing, tokens)?;
            Ok(ExpertParallelBench::new(layer, &inputs.own()?, tokens)?)
        })
        .collect::<Result<_>>()?;
    let SharedDeviceTimes { dispatch_seconds, combine_seconds } = ExpertParallelBench::time_shared(&benches)?;
    let choice = layers[0].choice(tokens)?;
    Ok(Size {
        routing: routing.name(),
        tokens_per_rank: tokens,
        dispatch: choice.parallel.dispatch.name(),
        combine: choice.parallel.combine.name(),
        dispatch_seconds,
        combine_seconds,
        launches: choice.launches + 1,
        workspace_bytes: choice.workspace_bytes,
        window_bytes: choice.window_bytes,
    })
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!("{}, {} ranks on one GPU: {}\n", self.source, self.ranks, self.gpu);
        let microseconds = |seconds: f64| format!("{:.1}", seconds * 1e6);
        let row = |size: &Size| {
            vec![
                size.routing.into(),
                size.tokens_per_rank.to_string(),
                size.dispatch.into(),
                size.combine.into(),
                microseconds(size.dispatch_seconds),
                microseconds(size.combine_seconds),
                size.launches.to_string(),
                format::bytes(size.workspace_bytes as u64),
                format::bytes(size.window_bytes as u64),
            ]
        };
        let header =
            ["routing", "tokens", "dispatch", "combine", "dispatch", "combine", "launches", "workspace", "window"];
        text.push_str(&format::table(&header, 2, &self.sizes.iter().map(row).collect::<Vec<_>>()));
        text.push_str("times in us, of one rank, inside a graph, their parts apart and nothing between them\n");
        text
    }
}
