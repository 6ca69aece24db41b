//! `expertile quantize`: one layer's experts in another format, and the error that this makes.

use super::options::ReportOptions;
use crate::error::{Error, Result};
use crate::report::format;
use crate::report::progress::Progress;
use crate::{machine, memory, output, signals};
use expertile::WeightFormat;
use expertile_checkpoint::{
    Checkpoint, Expert, MoeLayer, QuantizedExpert, QuantizedLayer, QuantizedMatrix, WeightMatrix,
};
use expertile_oracle as oracle;
use half::bf16;
use rayon::prelude::*;
use serde::Serialize;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Write one MoE layer of a checkpoint with its experts in another format, and say how far they are from what they were.
///
/// The experts must be BF16, F16 or F32. Values are rounded to nearest even: e4m3 with a scale for each block of
/// 128 x 128, mxfp4 with the OCP's scale for each group of 32, int4 with a bf16 scale for each group of 32, its largest
/// magnitude over 7. The folder that is written is a checkpoint of this one
/// layer, under the same number; the router, biases and the shared expert are copied.
///
/// An error is 1 - 2 sum(x y) / sum(x^2 + y^2) of the weights before and after, decoded by the f64 oracle: about half
/// the square of their relative difference.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  expertile quantize --model DIR --layer 3 --weights mxfp4 --output OUT
  expertile quantize --model DIR --layer 3 --weights e4m3 --output OUT --json")]
pub(crate) struct Args {
    /// Folder of a Hugging Face checkpoint: config.json with model.safetensors, or an index with shards.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Number of the layer in the checkpoint, from 0.
    #[arg(long, value_name = "N")]
    layer: usize,
    /// What the experts become: mxfp4, int4 or e4m3.
    #[arg(long, value_name = "FORMAT")]
    weights: WeightFormat,
    /// Folder to write config.json and model.safetensors into; made if it is not there, and must be empty if it is.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Threads [default: as many as the machine runs at once].
    #[arg(long, value_name = "T")]
    threads: Option<usize>,
    #[command(flatten, next_help_heading = "Output")]
    report: ReportOptions,
}

#[derive(Debug, Serialize)]
struct Report {
    source: String,
    layer: usize,
    /// The type of the weights where they came from.
    weight_dtype: &'static str,
    weights: &'static str,
    /// Bytes of the experts before and after.
    bytes_before: u64,
    bytes_after: u64,
    /// Of all experts together.
    error: f64,
    experts: Vec<ExpertError>,
}

/// How far an expert is from what it was, whole and by matrix.
#[derive(Debug, Clone, Copy, Serialize)]
struct ExpertError {
    expert: usize,
    error: f64,
    /// Absent where experts have no gate.
    gate: Option<f64>,
    up: f64,
    down: f64,
}

/// `sum(x y)` and `sum(x^2 + y^2)`.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    products: f64,
    squares: f64,
}

impl Sums {
    fn plus(self, other: Self) -> Self {
        Self { products: self.products + other.products, squares: self.squares + other.squares }
    }

    fn error(self) -> f64 {
        if self.squares == 0.0 { 0.0 } else { (1.0 - 2.0 * self.products / self.squares).max(0.0) }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.weights == WeightFormat::Bf16 {
        return Err(Error::usage("--weights is bf16, expected e4m3, mxfp4 or int4"));
    }
    require_empty(&args.output)?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let layer = checkpoint.layer(args.layer)?;
    signals::name_mapped_files(checkpoint.mapped_files());
    let quantized = QuantizedLayer::new(&checkpoint, &layer, args.weights)?;
    let shape = layer.shape();
    let [rows, hidden, intermediate] = [shape.w13_rows(), shape.hidden(), shape.intermediate()].map(|size| size as u64);
    let expert_bytes =
        |format: WeightFormat| format.matrix_bytes(rows, hidden) + format.matrix_bytes(hidden, intermediate);
    let bytes = |format| shape.local_experts() as u64 * expert_bytes(format);
    memory::require("the layer in its new format", u128::from(bytes(args.weights)))?;
    let (experts, errors, all) = machine::pool(args.threads)?.install(|| quantize(&layer, args.weights))?;

    let failed = |source| Error::write(&args.output, source);
    std::fs::create_dir_all(&args.output).map_err(failed)?;
    let config = quantized.config()?;
    let write = &mut |out: &mut dyn io::Write| quantized.write(&experts, &mut io::BufWriter::new(out));
    output::write_file_with(&args.output.join("model.safetensors"), write)?;
    // Last, so that a folder with a config is whole.
    output::write_file(&args.output.join("config.json"), config.as_bytes())?;
    let report = Report {
        source: args.model.display().to_string(),
        layer: args.layer,
        weight_dtype: layer.weight_dtype(),
        weights: args.weights.name(),
        bytes_before: if layer.weight_dtype() == "F32" { 2 } else { 1 } * bytes(WeightFormat::Bf16),
        bytes_after: bytes(args.weights),
        error: all.error(),
        experts: errors,
    };
    args.report.tell(&report, Report::text)
}

/// Fails unless the folder is empty or not there: nothing of a checkpoint may be replaced by half.
fn require_empty(folder: &Path) -> Result<()> {
    let refuse = |expected: &str| {
        Err(Error::Target { option: "--output", file: folder.to_owned(), expected: expected.to_owned() })
    };
    match std::fs::read_dir(folder).map(Iterator::count) {
        Ok(0) => Ok(()),
        Ok(_) => refuse("a folder that is empty, or none"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => refuse("a folder"),
        Err(error) => Err(Error::write(folder, error)),
    }
}

/// All experts, and how far each is from what it was; then all together.
fn quantize(layer: &MoeLayer<'_>, format: WeightFormat) -> Result<(Vec<QuantizedExpert>, Vec<ExpertError>, Sums)> {
    let experts = layer.experts();
    let (progress, done) = (Progress::new("quantizing experts", experts.len()), AtomicUsize::new(0));
    let each = experts.par_iter().enumerate().map(|(id, expert)| {
        let result = quantize_expert(id, expert, format)?;
        progress.set(done.fetch_add(1, Ordering::Relaxed) + 1);
        Ok(result)
    });
    let each: Vec<_> = each.collect::<Result<_>>()?;
    let all = each.iter().fold(Sums::default(), |all, (_, _, sums)| all.plus(*sums));
    let (experts, errors) = each.into_iter().map(|(expert, error, _)| (expert, error)).unzip();
    Ok((experts, errors, all))
}

fn quantize_expert(
    id: usize,
    expert: &Expert<'_>,
    format: WeightFormat,
) -> Result<(QuantizedExpert, ExpertError, Sums)> {
    let quantize = |part: &str, matrix: &WeightMatrix<'_>| -> Result<(QuantizedMatrix, Sums)> {
        let failed = |source| expertile_checkpoint::Error::Pack { what: format!("{part} of expert {id}"), source };
        let quantized = matrix.quantize(format).map_err(failed)?;
        let sums = compare(matrix, &quantized, format);
        Ok((quantized, sums))
    };
    let gate = expert.gate.as_ref().map(|gate| quantize("gate", gate)).transpose()?;
    let ((up, up_sums), (down, down_sums)) = (quantize("up", &expert.up)?, quantize("down", &expert.down)?);
    let (gate, gate_sums) = gate.unzip();
    let all = gate_sums.unwrap_or_default().plus(up_sums).plus(down_sums);
    let error = ExpertError {
        expert: id,
        error: all.error(),
        gate: gate_sums.map(Sums::error),
        up: up_sums.error(),
        down: down_sums.error(),
    };
    Ok((QuantizedExpert { gate, up, down }, error, all))
}

/// A matrix beside what the oracle reads in its quantized bytes.
fn compare(before: &WeightMatrix<'_>, after: &QuantizedMatrix, format: WeightFormat) -> Sums {
    let cols = before.cols();
    let scales: Vec<f32> = after.scales.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let halves = after.scales.as_chunks::<2>().0.iter();
    let halves: Vec<f64> = halves.map(|&bytes| bf16::from_le_bytes(bytes).to_f64()).collect();
    let (mut x, mut y) = (vec![0.0; cols], vec![0.0; cols]);
    let mut sums = Sums::default();
    for row in 0..before.rows() {
        before.write_row(row, &mut x);
        match format {
            WeightFormat::Mxfp4 => oracle::mxfp4::weight_row(&after.values, &after.scales, cols, row, &mut y),
            WeightFormat::E4m3 => oracle::gemm::e4m3_weight_row(&after.values, &scales, cols, row, &mut y),
            WeightFormat::Int4 => oracle::int4::weight_row(&after.values, &halves, cols, row, &mut y),
            WeightFormat::Bf16 => unreachable!("it was refused"),
        }
        for (x, y) in x.iter().zip(&y) {
            sums = sums.plus(Sums { products: x * y, squares: x * x + y * y });
        }
    }
    sums
}

impl Report {
    fn text(&self) -> String {
        /// Experts that the table lists: those with the largest errors.
        const LISTED: usize = 8;
        let Self { source, layer, weight_dtype, weights, bytes_before, bytes_after, error, experts } = self;
        let [before, after] = [bytes_before, bytes_after].map(|&count| format::bytes(count));
        let mut text = format!(
            "{source}, layer {layer}: {} experts from {weight_dtype} ({before}) to {weights} ({after})\n\
             error of all weights: {error:.2e}\n",
            experts.len()
        );
        let mut worst: Vec<&ExpertError> = experts.iter().collect();
        worst.sort_by(|a, b| b.error.total_cmp(&a.error));
        worst.truncate(LISTED);
        let number = |value: f64| format!("{value:.2e}");
        let rows: Vec<Vec<String>> = worst
            .into_iter()
            .map(|of| {
                let gate = of.gate.map_or("-".into(), number);
                vec![of.expert.to_string(), number(of.error), gate, number(of.up), number(of.down)]
            })
            .collect();
        if rows.len() < experts.len() {
            let _ = writeln!(text, "the {LISTED} experts with the largest errors (--json has all):");
        }
        text + &format::table(&["expert", "error", "gate", "up", "down"], 1, &rows)
    }
}
