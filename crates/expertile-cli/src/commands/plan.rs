//! `expertile plan`: what padding costs, and what expert parallelism does (`plan/ranks`).

mod ranks;

use super::options::ReportOptions;
use crate::error::{Error, Result};
use crate::report::{format, plot};
use crate::{memory, output};
use expertile::plan::{compute_aligned_m_and_alignment, expert_num_tokens_round_up_and_sum, tight_m_sum};
use expertile::{ActivationFormat, AlignmentRule, Arch, Routing, ScaleFormat, TokenExperts};
use expertile_checkpoint::Ids;
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// The alignments that are set side by side.
const ALIGNMENTS: [usize; 6] = [8, 16, 32, 64, 128, 256];

/// Say what padding costs: rows of the permuted buffer, padding among them, workspace.
///
/// Three sizes are given: the reference's bound, the tight bound (the exact maximum over all routings) and, when --ids
/// or --counts give the routing, the exact sum. Live rows are counted when the routing is known, else they are the
/// most there can be, tokens * min(topk, local experts). Padding is the rest of the exact size, or of the tight bound
/// where there is no exact size.
///
/// With --ranks: what expert parallelism costs by placement, in rows, bytes, modelled time and memory.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
#[command(override_usage = "\
    expertile plan --tokens <M> --topk <K> --experts <G> [OPTIONS]\n       \
    expertile plan --tokens <M> --topk <K> --counts <N,N,...> [OPTIONS]\n       \
    expertile plan --ids <FILE> --experts <G> [OPTIONS]\n       \
    expertile plan --ranks <R> --tokens <M> --topk <K> --experts <G> --hidden <H> --intermediate <I> [OPTIONS]")]
#[command(after_help = "\
Examples:
  expertile plan --tokens 128 --topk 8 --experts 128 --hidden 2048 --intermediate 768
  expertile plan --tokens 10 --topk 2 --counts 9,0,8,2 --alignment 8 --plot plan.svg")]
pub(crate) struct Args {
    /// Tokens, M.
    #[arg(long, value_name = "M", required_unless_present = "ids")]
    tokens: Option<usize>,
    /// Experts per token.
    #[arg(long, value_name = "K", required_unless_present = "ids")]
    topk: Option<usize>,
    /// Experts in all, over every rank.
    #[arg(long, value_name = "G", required_unless_present = "counts")]
    experts: Option<usize>,
    /// Experts of this rank, those with the lowest global ids [default: all].
    #[arg(long, value_name = "E")]
    local_experts: Option<usize>,
    /// Rows that each expert's segment is padded to a multiple of.
    #[arg(long, value_name = "A", default_value_t = 128)]
    alignment: usize,
    /// GPU generation that the rule is asked about: sm90, sm100 or sm120.
    #[arg(long, requires = "rule", value_name = "ARCH")]
    arch: Option<Arch>,
    /// The GEMM's rule, which may shrink the alignment: deepgemm-2026-06, vllm-fork or deepgemm-2.8.
    #[arg(long, requires = "arch", value_name = "NAME")]
    rule: Option<AlignmentRule>,
    /// Hidden size H; with --intermediate, the workspace is counted.
    ///
    /// Counted, for M_sum rows: the permuted rows [M_sum, H] and the activated rows [M_sum, I], each e4m3 with one f32
    /// scale per 128 values (or bf16, see --activations), the first GEMM's rows [M_sum, 2 I] and the second's [M_sum,
    /// H], both bf16. Every buffer has its own place; M_sum is the exact size where it is known, else the tight bound.
    #[arg(long, value_name = "H", requires = "intermediate")]
    hidden: Option<usize>,
    /// Intermediate size I of one expert.
    #[arg(long, value_name = "I", requires = "hidden")]
    intermediate: Option<usize>,
    /// What the GEMMs read, for the workspace: e4m3 or bf16.
    #[arg(long, value_name = "FORMAT", default_value = "e4m3")]
    activations: ActivationFormat,
    /// topk_ids [M, topk], i32 or i64, as .npy or .safetensors: global expert ids, a negative one for an empty slot.
    #[arg(long, value_name = "FILE", conflicts_with = "counts")]
    ids: Option<PathBuf>,
    /// Rows of each local expert, separated by commas.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', allow_hyphen_values = true)]
    counts: Option<Vec<i32>>,
    /// Draw tokens per expert with the padding on top, as SVG; needs --ids or --counts. With --ranks: rows per rank.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Expert parallelism")]
    ranks: ranks::RankOptions,
    #[command(flatten)]
    report: ReportOptions,
}

/// Experts that are counted one by one: some thousand times what any model has.
const MOST_EXPERTS: usize = 1 << 22;

/// Experts that are drawn: a picture of more would be gigabytes, and wider than any screen.
const MOST_BARS: usize = 1 << 16;

/// What is to be sized, whatever options it came from.
#[derive(Debug)]
struct Question {
    tokens: usize,
    topk: usize,
    experts: usize,
    local_experts: usize,
    token_experts: TokenExperts,
    /// `expert_num_tokens`, where the routing is known.
    counts: Option<Vec<i32>>,
    /// `H`, `I` and what the GEMMs read.
    widths: Option<(usize, usize, ActivationFormat)>,
}

/// The sizes at one alignment.
#[derive(Debug, Clone, Serialize)]
struct Sizes {
    alignment: usize,
    m_sum_reference: usize,
    m_sum_tight: usize,
    m_sum_exact: Option<usize>,
    live_rows: usize,
    padding_rows: usize,
    workspace_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    asked: Sizes,
    by_alignment: Vec<Sizes>,
    tokens: usize,
    topk: usize,
    experts: usize,
    local_experts: usize,
    arch: Option<&'static str>,
    rule: Option<&'static str>,
    expert_num_tokens: Option<Vec<i32>>,
    /// Rows of the fullest expert over the mean; null without rows.
    imbalance: Option<f64>,
    empty_experts: Option<usize>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let placement = ("--placement-output", args.ranks.placement_output.as_deref());
    let targets = [("--plot", args.plot.as_deref()), ("--json", args.report.file()), placement];
    let inputs: Vec<PathBuf> = args.ids.iter().cloned().chain(args.ranks.inputs()).collect();
    output::prepare(&targets, &inputs)?;
    if let Some(ranks) = args.ranks.ranks {
        return ranks::run(args, ranks);
    }
    let question = Question::from_args(args)?;
    let report = Report::new(args, &question)?;
    if let Some(file) = &args.plot {
        let counts = question.counts.as_deref().ok_or_else(|| Error::usage("--plot needs --ids or --counts"))?;
        if counts.len() > MOST_BARS {
            let bars = counts.len();
            return Err(Error::usage(format!("--plot is of {bars} experts, expected at most {MOST_BARS}")));
        }
        output::write_file(file, plot::tokens_per_expert(counts, report.asked.alignment).as_bytes())?;
    }
    args.report.tell(&report, |report| report.text(args))
}

impl Question {
    fn from_args(args: &Args) -> Result<Self> {
        args.ids.as_deref().map_or(Ok(()), memory::require_file)?;
        let ids = args.ids.as_deref().map(Ids::open).transpose()?;
        let (tokens, topk) = match &ids {
            Some(ids) => (agree("--tokens", args.tokens, ids.tokens())?, agree("--topk", args.topk, ids.topk())?),
            None => (args.tokens.unwrap_or_default(), args.topk.unwrap_or_default()),
        };
        let counted = args.counts.as_ref().map(Vec::len);
        let experts = args.experts.or(counted).unwrap_or_default();
        let local_experts = args.local_experts.unwrap_or(experts);
        if local_experts > experts {
            return Err(Error::usage(format!("--local-experts is {local_experts}, expected at most {experts}")));
        }
        let widths = args.hidden.zip(args.intermediate).map(|(hidden, inner)| (hidden, inner, args.activations));
        let mut question = Self {
            tokens,
            topk,
            experts,
            local_experts,
            token_experts: TokenExperts::Distinct,
            counts: args.counts.clone(),
            widths,
        };
        if let Some(ids) = &ids {
            question.count(ids)?;
        }
        question.check_counts()?;
        Ok(question)
    }

    fn count(&mut self, ids: &Ids) -> Result<()> {
        // Before there is a list of them.
        if self.experts > MOST_EXPERTS {
            return Err(Error::usage(format!(
                "--experts is {}, expected at most {MOST_EXPERTS} with --ids",
                self.experts
            )));
        }
        let map: Vec<i32> = (0..self.experts).map(|id| if id < self.local_experts { id as i32 } else { -1 }).collect();
        let map = (self.local_experts < self.experts).then_some(&map[..]);
        let mut counts = vec![0; self.local_experts];
        Routing::new(ids.view(), self.local_experts, map)?.count_expert_num_tokens(&mut counts)?;
        self.counts = Some(counts);
        if any_token_repeats(ids) {
            self.token_experts = TokenExperts::MayRepeat;
        }
        Ok(())
    }

    fn check_counts(&mut self) -> Result<()> {
        let Some(counts) = &self.counts else { return Ok(()) };
        if counts.len() != self.local_experts {
            return Err(Error::usage(format!(
                "--counts holds {} numbers, expected one for each of {} local experts",
                counts.len(),
                self.local_experts
            )));
        }
        let live: i64 = counts.iter().map(|&count| i64::from(count.max(0))).sum();
        let (tokens, topk) = (self.tokens, self.topk);
        if tokens.checked_mul(topk).is_some_and(|slots| live as u64 > slots as u64) {
            return Err(Error::usage(format!("--counts add up to {live}, expected at most {tokens} tokens * {topk}")));
        }
        if counts.iter().any(|&count| i64::from(count) > tokens as i64) {
            self.token_experts = TokenExperts::MayRepeat;
        }
        Ok(())
    }

    /// The sizes at `alignment`, or at the smaller one that the rule picks.
    fn sizes(&self, alignment: usize, rule: Option<(AlignmentRule, Arch)>) -> Result<Sizes> {
        let Self { tokens, topk, local_experts, .. } = *self;
        let (m_sum_reference, alignment) =
            compute_aligned_m_and_alignment(tokens, topk, local_experts, alignment, rule, None)?;
        let m_sum_tight = tight_m_sum(tokens, topk, local_experts, alignment, self.token_experts)?;
        let exact = |counts: &Vec<i32>| expert_num_tokens_round_up_and_sum(counts, alignment);
        let m_sum_exact = self.counts.as_ref().map(exact).transpose()?;
        let m_sum = m_sum_exact.unwrap_or(m_sum_tight);
        let live_rows = match &self.counts {
            Some(counts) => counts.iter().map(|&count| count as usize).sum(),
            None => tokens * topk.min(local_experts),
        };
        Ok(Sizes {
            alignment,
            m_sum_reference,
            m_sum_tight,
            m_sum_exact,
            live_rows,
            padding_rows: m_sum - live_rows,
            workspace_bytes: self.workspace_bytes(m_sum)?,
        })
    }

    /// The sum that the help of `--hidden` spells out.
    fn workspace_bytes(&self, m_sum: usize) -> Result<Option<u64>> {
        let Some((hidden, intermediate, activations)) = self.widths else { return Ok(None) };
        let row = match activations {
            ActivationFormat::E4m3 => {
                let scales = |width| Ok::<_, Error>(4 * ScaleFormat::HOPPER.groups(width)? as u128);
                hidden as u128 + scales(hidden)? + intermediate as u128 + scales(intermediate)?
            }
            ActivationFormat::Bf16 => 2 * hidden as u128 + 2 * intermediate as u128,
        } + 2 * (2 * intermediate as u128)
            + 2 * hidden as u128;
        let bytes = row.checked_mul(m_sum as u128).and_then(|bytes| u64::try_from(bytes).ok());
        match bytes {
            Some(bytes) => Ok(Some(bytes)),
            None => Err(Error::usage(format!("the workspace of {m_sum} rows of {row} bytes overflows"))),
        }
    }
}

/// The file's number, unless an option says another.
fn agree(option: &str, given: Option<usize>, in_file: usize) -> Result<usize> {
    match given {
        Some(given) if given != in_file => {
            Err(Error::usage(format!("{option} is {given}, expected {in_file}, as in the file of ids")))
        }
        _ => Ok(in_file),
    }
}

fn any_token_repeats(ids: &Ids) -> bool {
    let view = ids.view();
    let mut row = Vec::new();
    (0..view.tokens()).any(|token| {
        row.clear();
        row.extend((0..view.topk()).map(|slot| view.get(token, slot)).filter(|&id| id >= 0));
        row.sort_unstable();
        row.windows(2).any(|pair| pair[0] == pair[1])
    })
}

impl Report {
    fn new(args: &Args, question: &Question) -> Result<Self> {
        let asked = question.sizes(args.alignment, args.rule.zip(args.arch))?;
        let by_alignment =
            ALIGNMENTS.into_iter().map(|alignment| question.sizes(alignment, None)).collect::<Result<_>>()?;
        let counts = question.counts.as_deref();
        let imbalance = counts.filter(|_| asked.live_rows > 0).map(|counts| {
            let fullest = counts.iter().copied().max().unwrap_or_default();
            f64::from(fullest) * counts.len() as f64 / asked.live_rows as f64
        });
        Ok(Self {
            asked,
            by_alignment,
            tokens: question.tokens,
            topk: question.topk,
            experts: question.experts,
            local_experts: question.local_experts,
            arch: args.arch.map(Arch::name),
            rule: args.rule.map(AlignmentRule::name),
            expert_num_tokens: question.counts.clone(),
            imbalance,
            empty_experts: counts.map(|counts| counts.iter().filter(|&&count| count == 0).count()),
        })
    }

    fn text(&self, args: &Args) -> String {
        let mut text = format!("{} tokens, {} of {} experts each", self.tokens, self.topk, self.experts);
        if self.local_experts != self.experts {
            let _ = write!(text, ", {} of them local", self.local_experts);
        }
        text.push('\n');
        if let (Some(rule), Some(arch)) = (self.rule, self.arch) {
            let _ =
                writeln!(text, "rule {rule} on {arch}: alignment {} (asked: {})", self.asked.alignment, args.alignment);
        }
        self.describe_distribution(&mut text);
        let mut rows = vec![self.asked.row(&format!("{} (asked)", self.asked.alignment))];
        rows.extend(self.by_alignment.iter().map(|sizes| sizes.row(&sizes.alignment.to_string())));
        let header = ["alignment", "reference", "tight bound", "exact", "live rows", "padding", "share", "workspace"];
        text.push_str(&format::table(&header, 0, &rows));
        text.push_str(match self.asked.m_sum_exact {
            Some(_) => "padding and workspace: of the exact size\n",
            None => "live rows: the most there can be; padding and workspace: of the tight bound\n",
        });
        text
    }

    fn describe_distribution(&self, text: &mut String) {
        let (Some(counts), Some(empty)) = (&self.expert_num_tokens, self.empty_experts) else { return };
        let fullest = counts.iter().enumerate().rev().max_by_key(|&(_, &count)| count);
        if let (Some(imbalance), Some((expert, rows))) = (self.imbalance, fullest) {
            let mean = self.asked.live_rows as f64 / counts.len() as f64;
            let _ = writeln!(
                text,
                "fullest expert: {expert} with {rows} rows, mean {mean:.1}, imbalance (max / mean) {imbalance:.2}"
            );
        }
        let _ = writeln!(text, "empty experts: {empty} of {}", counts.len());
    }
}

impl Sizes {
    fn row(&self, alignment: &str) -> Vec<String> {
        let m_sum = self.m_sum_exact.unwrap_or(self.m_sum_tight);
        let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".into());
        vec![
            alignment.to_owned(),
            self.m_sum_reference.to_string(),
            self.m_sum_tight.to_string(),
            or_dash(self.m_sum_exact.map(|rows| rows.to_string())),
            self.live_rows.to_string(),
            self.padding_rows.to_string(),
            or_dash((m_sum > 0).then(|| format::percent(self.padding_rows as f64 / m_sum as f64))),
            or_dash(self.workspace_bytes.map(format::bytes)),
        ]
    }
}
