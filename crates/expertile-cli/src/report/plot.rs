//! Pictures, as SVG text: drawn from numbers alone, the viewer brings the font.

use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const HEIGHT: u32 = 440;
const MARGIN: u32 = 12;
const Y_LABELS: u32 = 68;
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(228, 228, 228);
const LIVE: RGBColor = RGBColor(31, 119, 180);
const PADDING: RGBColor = RGBColor(247, 182, 120);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// Pixels of a bar and of its share of the axis: whole numbers, so that all gaps are equally wide.
struct Bars {
    pitch: u32,
    width: u32,
}

impl Bars {
    const PLOT_WIDTH: u32 = 912;
    const WIDEST: u32 = 120;

    fn new(count: usize) -> Self {
        let pitch = (Self::PLOT_WIDTH / count.max(1) as u32).max(4);
        Self { pitch, width: (pitch - (pitch / 5).max(1)).min(Self::WIDEST) }
    }
}

/// Rows of each expert as bars, the padding to `alignment` drawn on top.
pub(crate) fn tokens_per_expert(expert_num_tokens: &[i32], alignment: usize) -> String {
    let bars: Vec<(i64, i64)> = expert_num_tokens
        .iter()
        .map(|&count| {
            let live = i64::from(count);
            // An alignment beyond i64 has been asked for, not met.
            let padded = (live as u64).checked_next_multiple_of(alignment as u64);
            (live, padded.and_then(|rows| i64::try_from(rows).ok()).unwrap_or(i64::MAX))
        })
        .collect();
    let mut svg = String::new();
    {
        let width = Bars::new(bars.len()).pitch * bars.len() as u32 + Y_LABELS + 2 * MARGIN;
        let area = SVGBackend::with_string(&mut svg, (width, HEIGHT)).into_drawing_area();
        draw_bars(&area, &bars, alignment).expect("drawing into memory meets nothing that can fail");
    }
    svg
}

fn draw_bars(area: &Area<'_>, bars: &[(i64, i64)], alignment: usize) -> Drawn {
    area.fill(&WHITE)?;
    let live: i128 = bars.iter().map(|bar| i128::from(bar.0)).sum();
    let rows: i128 = bars.iter().map(|bar| i128::from(bar.1)).sum();
    let share = if rows == 0 { 0.0 } else { 100.0 * (rows - live) as f64 / rows as f64 };
    write_text(area, "Tokens per expert", (24, 16), 20, INK)?;
    let summary = format!(
        "local experts: {}, alignment: {alignment}, rows: {rows}, {} of them padding ({share:.1} %)",
        bars.len(),
        rows - live
    );
    write_text(area, &summary, (24, 42), 14, INK)?;
    draw_legend(area)?;
    let (_, below) = area.split_vertically(64);
    let top = bars.iter().map(|bar| bar.1).max().unwrap_or(0).max(1);
    let mut chart = ChartBuilder::on(&below)
        .margin(MARGIN)
        .x_label_area_size(42)
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d(-0.5..bars.len() as f64 - 0.5, 0.0..top as f64 * 1.04)?;
    let whole = |value: &f64| if value.fract() == 0.0 { format!("{value:.0}") } else { String::new() };
    draw_axes(&mut chart, bars.len().min(17), ("local expert", &whole), ("rows", &whole))?;
    let Bars { pitch, width } = Bars::new(bars.len());
    let (left, width) = (0.5 * f64::from(width) / f64::from(pitch), f64::from(width) / f64::from(pitch));
    for (expert, &(live, padded)) in bars.iter().enumerate() {
        let x = expert as f64 - left;
        let block = |from: i64, to: i64, color: RGBColor| {
            Rectangle::new([(x, from as f64), (x + width, to as f64)], color.filled())
        };
        if live > 0 {
            chart.draw_series([block(0, live, LIVE)])?;
        }
        if padded > live {
            chart.draw_series([block(live, padded, PADDING)])?;
        }
    }
    area.present()?;
    Ok(())
}

/// Rows of the ranks, fullest first, for each of several placements.
pub(crate) fn rows_per_rank(placements: &[(&str, &[u64])]) -> String {
    const WIDTH: u32 = 1080;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        draw_ranks(&area, placements).expect("drawing into memory meets nothing that can fail");
    }
    svg
}

fn draw_ranks(area: &Area<'_>, placements: &[(&str, &[u64])]) -> Drawn {
    area.fill(&WHITE)?;
    let ranks = placements.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0);
    let all = placements.first().map_or(0, |(_, rows)| rows.iter().sum::<u64>());
    let mean = all as f64 / ranks.max(1) as f64;
    write_text(area, "Rows per rank", (24, 16), 20, INK)?;
    let summary =
        format!("ranks: {ranks}, rows: {all}, {mean:.1} on average: what is above it, the other ranks wait for");
    write_text(area, &summary, (24, 42), 14, INK)?;
    let (_, below) = area.split_vertically(64);
    let (left, legend) = below.split_horizontally(840);
    let top = placements.iter().flat_map(|(_, rows)| rows.iter().copied()).max().unwrap_or(0).max(1);
    let mut chart = ChartBuilder::on(&left)
        .margin(MARGIN)
        .x_label_area_size(42)
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d(0.5..ranks as f64 + 0.5, 0.0..top as f64 * 1.04)?;
    let whole = |value: &f64| if value.fract() == 0.0 { format!("{value:.0}") } else { String::new() };
    draw_axes(&mut chart, ranks.clamp(1, 17), ("ranks, fullest first", &whole), ("rows", &whole))?;
    chart.draw_series([PathElement::new([(0.5, mean), (ranks as f64 + 0.5, mean)], INK.stroke_width(1))])?;
    for (index, ((name, rows), color)) in placements.iter().zip(STAGE_COLORS.iter().skip(1).cycle()).enumerate() {
        let mut rows = rows.to_vec();
        rows.sort_unstable_by(|a, b| b.cmp(a));
        let points: Vec<(f64, f64)> =
            rows.iter().enumerate().map(|(at, &rows)| (at as f64 + 1.0, rows as f64)).collect();
        chart.draw_series([PathElement::new(points.clone(), color.stroke_width(2))])?;
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 3, color.filled())))?;
        let y = 20 + 26 * index as i32;
        legend.draw(&Rectangle::new([(8, y), (22, y + 14)], color.filled()))?;
        write_text(&legend, name, (30, y), 14, INK)?;
    }
    area.present()?;
    Ok(())
}

/// What an axis is called, and how its labels are written.
type Axis<'a> = (&'a str, &'a dyn Fn(&f64) -> String);

/// Axes with at most so many labels on x, and lines across for y.
fn draw_axes<Y: Ranged<ValueType = f64> + ValueFormatter<f64>>(
    chart: &mut ChartContext<'_, SVGBackend<'_>, Cartesian2d<RangedCoordf64, Y>>,
    x_labels: usize,
    x: Axis<'_>,
    y: Axis<'_>,
) -> Drawn {
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 14).into_font().color(&INK))
        .x_labels(x_labels)
        .x_label_formatter(x.1)
        .y_label_formatter(y.1)
        .x_desc(x.0)
        .y_desc(y.0)
        .draw()?;
    Ok(())
}

fn draw_legend(area: &Area<'_>) -> Drawn {
    let right = area.dim_in_pixel().0 as i32;
    for (name, color, x) in [("tokens", LIVE, right - 200), ("padding", PADDING, right - 100)] {
        area.draw(&Rectangle::new([(x, 20), (x + 14, 34)], color.filled()))?;
        write_text(area, name, (x + 20, 19), 14, INK)?;
    }
    Ok(())
}

fn write_text(area: &Area<'_>, text: &str, at: (i32, i32), size: i32, color: RGBColor) -> Drawn {
    let style = ("sans-serif", size).into_font().color(&color).pos(Pos::new(HPos::Left, VPos::Top));
    area.draw_text(text, &style, at)?;
    Ok(())
}

/// Colours of the stages, in order.
const STAGE_COLORS: [RGBColor; 6] = [
    RGBColor(127, 127, 127),
    RGBColor(247, 182, 120),
    RGBColor(31, 119, 180),
    RGBColor(148, 103, 189),
    RGBColor(107, 174, 214),
    RGBColor(44, 160, 44),
];

/// What a number of tokens took.
pub(crate) struct SizeTimes {
    pub(crate) tokens: usize,
    pub(crate) seconds: f64,
    /// The least that it can take.
    pub(crate) least_seconds: f64,
    /// Stages by name, and their seconds.
    pub(crate) parts: Vec<(&'static str, f64)>,
}

/// The time over the number of tokens beside the least it can be, and what part of it each stage takes.
pub(crate) fn time_by_size(heading: &str, title: &str, sizes: &[SizeTimes]) -> String {
    const WIDTH: u32 = 1080;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        draw_sizes(&area, heading, title, sizes).expect("drawing into memory meets nothing that can fail");
    }
    svg
}

fn draw_sizes(area: &Area<'_>, heading: &str, title: &str, sizes: &[SizeTimes]) -> Drawn {
    area.fill(&WHITE)?;
    write_text(area, heading, (24, 16), 20, INK)?;
    write_text(area, title, (24, 42), 14, INK)?;
    let (_, below) = area.split_vertically(64);
    let (left, right) = below.split_horizontally(500);
    draw_times(&left, sizes)?;
    let (bars, legend) = right.split_horizontally(440);
    draw_parts(&bars, sizes)?;
    let stages = sizes.first().map_or(&[][..], |size| &size.parts[..]);
    for (index, (&(stage, _), color)) in stages.iter().zip(STAGE_COLORS).rev().enumerate() {
        let y = 40 + 26 * index as i32;
        legend.draw(&Rectangle::new([(8, y), (22, y + 14)], color.filled()))?;
        write_text(&legend, stage, (30, y), 14, INK)?;
    }
    area.present()?;
    Ok(())
}

/// Two lines over the position of each size: time, and the least time, on a logarithmic scale.
fn draw_times(area: &Area<'_>, sizes: &[SizeTimes]) -> Drawn {
    let measured: Vec<f64> = sizes.iter().map(|size| size.seconds * 1e3).collect();
    let least: Vec<f64> = sizes.iter().map(|size| size.least_seconds * 1e3).collect();
    // Whole powers of ten around everything; a nanosecond to a day whatever the numbers.
    let exponents = || measured.iter().chain(&least).map(|value| value.clamp(1e-6, 1e8).log10().floor() as i32);
    let low = 10f64.powi(exponents().min().unwrap_or(0));
    let high = 10f64.powi(exponents().max().unwrap_or(0) + 1);
    let mut chart = ChartBuilder::on(area)
        .margin(MARGIN)
        .x_label_area_size(42)
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d(-0.5..sizes.len() as f64 - 0.5, (low..high).log_scale())?;
    let tokens = |x: &f64| size_label(sizes, *x);
    draw_axes(&mut chart, sizes.len(), ("tokens", &tokens), ("milliseconds", &|y| format!("{y}")))?;
    for (values, color, name, label_y) in [(&measured, LIVE, "measured", 12), (&least, PADDING, "limit", 34)] {
        let points: Vec<(f64, f64)> =
            values.iter().enumerate().map(|(at, &value)| (at as f64, value.max(low))).collect();
        chart.draw_series([PathElement::new(points.clone(), color.stroke_width(2))])?;
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 4, color.filled())))?;
        area.draw(&PathElement::new([(100, label_y + 8), (120, label_y + 8)], color.stroke_width(2)))?;
        write_text(area, name, (128, label_y), 14, INK)?;
    }
    Ok(())
}

/// One bar per size, cut into the stages' parts of the time.
fn draw_parts(area: &Area<'_>, sizes: &[SizeTimes]) -> Drawn {
    let mut chart = ChartBuilder::on(area)
        .margin(MARGIN)
        .x_label_area_size(42)
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d(-0.5..sizes.len() as f64 - 0.5, 0.0..100.0)?;
    let tokens = |x: &f64| size_label(sizes, *x);
    draw_axes(&mut chart, sizes.len(), ("tokens", &tokens), ("part of the time", &|y| format!("{y:.0} %")))?;
    for (at, size) in sizes.iter().enumerate() {
        let mut from = 0.0;
        let all: f64 = size.parts.iter().map(|part| part.1).sum();
        for (&(_, seconds), color) in size.parts.iter().zip(STAGE_COLORS) {
            let to = from + 100.0 * seconds / all.max(1e-12);
            let x = at as f64;
            chart.draw_series([Rectangle::new([(x - 0.35, from), (x + 0.35, to)], color.filled())])?;
            from = to;
        }
    }
    Ok(())
}

fn size_label(sizes: &[SizeTimes], x: f64) -> String {
    if x.fract() != 0.0 || x < 0.0 {
        return String::new();
    }
    sizes.get(x as usize).map_or_else(String::new, |size| size.tokens.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(tokens: usize) -> SizeTimes {
        SizeTimes { tokens, seconds: 1.0, least_seconds: 1e-4, parts: vec![("permute", 0.5), ("unpermute", 0.5)] }
    }

    #[test]
    fn every_size_has_its_label_on_both_axes() {
        for count in 1..=12 {
            let sizes: Vec<SizeTimes> = (0..count).map(|at| size(7001 + at)).collect();
            let svg = time_by_size("heading", "title", &sizes);
            for size in &sizes {
                assert_eq!(svg.matches(&format!("\n{}\n", size.tokens)).count(), 2, "{count}: {}", size.tokens);
            }
        }
    }

    #[test]
    fn pictures_of_nothing_can_be_drawn() {
        assert!(time_by_size("heading", "title", &[]).contains("</svg>"));
        assert!(tokens_per_expert(&[], 8).contains("</svg>"));
        assert!(rows_per_rank(&[]).contains("</svg>"));
        assert!(rows_per_rank(&[("linear", &[0, 0]), ("balanced", &[u64::MAX / 4, 1])]).contains("balanced"));
        assert!(tokens_per_expert(&[0, 0], 8).contains("0.0 %"));
        assert!(tokens_per_expert(&[1, i32::MAX], usize::MAX).contains("100.0 %"));
    }
}
