//! `expertile bench`: a layer's stages timed, alone or in the whole layer, over a list of sizes; the exchange of ranks.

mod exchange;
mod layer;
mod memcpy;
mod on_cpu;
mod steps;
mod tiles;

use crate::error::Result;

/// Time a known model's layer, its steps, the exchange of several ranks, or the choice of tiles.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile bench layer --tokens 1,8,64,512 --plot bench.svg
  expertile bench steps --device cuda:0 --preset deepseek-v3 --local-experts 32")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Layer(layer::Args),
    Steps(steps::Args),
    Tiles(tiles::Args),
    Exchange(exchange::Args),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Layer(args) => layer::run(args),
        What::Steps(args) => steps::run(args),
        What::Tiles(args) => tiles::run(args),
        What::Exchange(args) => exchange::run(args),
    }
}
