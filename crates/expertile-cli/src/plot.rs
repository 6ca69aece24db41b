//! Pictures, as SVG text: drawn from numbers alone, the viewer brings the font.

use plotters::coord::Shift;
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
            (live, (live as u64).next_multiple_of(alignment as u64) as i64)
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

fn draw_bars(
    area: &Area<'_>,
    bars: &[(i64, i64)],
    alignment: usize,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let live: i64 = bars.iter().map(|bar| bar.0).sum();
    let rows: i64 = bars.iter().map(|bar| bar.1).sum();
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
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 14).into_font().color(&INK))
        .x_labels(bars.len().min(17))
        .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x:.0}") } else { String::new() })
        .y_label_formatter(&|y| if y.fract() == 0.0 { format!("{y:.0}") } else { String::new() })
        .x_desc("local expert")
        .y_desc("rows")
        .draw()?;
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

fn draw_legend(area: &Area<'_>) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let right = area.dim_in_pixel().0 as i32;
    for (name, color, x) in [("tokens", LIVE, right - 200), ("padding", PADDING, right - 100)] {
        area.draw(&Rectangle::new([(x, 20), (x + 14, 34)], color.filled()))?;
        write_text(area, name, (x + 20, 19), 14, INK)?;
    }
    Ok(())
}

fn write_text(
    area: &Area<'_>,
    text: &str,
    at: (i32, i32),
    size: i32,
    color: RGBColor,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let style = ("sans-serif", size).into_font().color(&color).pos(Pos::new(HPos::Left, VPos::Top));
    area.draw_text(text, &style, at)?;
    Ok(())
}
