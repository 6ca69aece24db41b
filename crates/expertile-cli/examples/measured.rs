//! Draws the README's picture from a file of results: a layer's time beside its peers', as a multiple of the floor.
//!
//! ```console
//! $ benches/plot                      # benches/results/2026-12-01-h200-rivals-joined.json to docs/measured.svg
//! $ benches/plot RESULTS.json OUT.svg
//! ```

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde_json::Value;

/// The layers that have a panel, in order.
const PANELS: [&str; 4] = ["dsv3_ep8", "dsv3_tp8", "qwen30b", "qwen235_tp4"];
/// Keys of the paths, with the colour and the width of their lines; ours is drawn last. A path that was timed at few
/// sizes has no line: what lies between its points is not known.
const PATHS: [(&str, RGBColor, u32); 4] = [
    ("flashinfer", RGBColor(148, 103, 189), 0),
    ("deepgemm", RGBColor(44, 160, 44), 0),
    ("triton", RGBColor(255, 127, 14), 2),
    ("ours", RGBColor(31, 119, 180), 4),
];
const INK: RGBColor = RGBColor(51, 51, 51);
const GRID: RGBColor = RGBColor(228, 228, 228);
const SIZE: (u32, u32) = (1040, 760);
const HEAD_PIXELS: i32 = 120;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[allow(dead_code)]
fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [results, picture] = &arguments[..] else { return Err("expected RESULTS.json OUT.svg".into()) };
    std::fs::write(picture, draw(&std::fs::read_to_string(results)?)?)?;
    Ok(())
}

/// The picture of a file of results.
pub(crate) fn draw(results: &str) -> Result<String> {
    let results: Value = serde_json::from_str(results)?;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        draw_head(&area, &results)?;
        let (_, below) = area.split_vertically(HEAD_PIXELS);
        for (panel, name) in below.split_evenly((2, 2)).iter().zip(PANELS) {
            let layers = results["layers"].as_array().ok_or("no list of layers")?;
            let layer = layers.iter().find(|layer| layer["name"] == name && layer["format"] == "e4m3");
            draw_layer(panel, layer.ok_or_else(|| format!("no layer {name}"))?)?;
        }
        area.present()?;
    }
    Ok(svg)
}

fn draw_head(area: &Area<'_>, results: &Value) -> Result<()> {
    let text = |key: &str| results[key].as_str().ok_or_else(|| format!("no {key}"));
    let title = format!("A layer of e4m3 experts on an {}, {}", text("device")?, text("date")?);
    write(area, &title, (24, 14), 20)?;
    let floor = format!(
        "Time as a multiple of the floor (weights read once at {} TB/s, or products at {} TFLOP/s); lower is better",
        results["read_terabytes_per_second"], results["e4m3_teraflops"]
    );
    write(area, &floor, (24, 42), 14)?;
    for (index, &(path, color, width)) in PATHS.iter().rev().enumerate() {
        let (x, y) = (24 + 420 * (index as i32 % 2), 70 + 22 * (index as i32 / 2));
        if width > 0 {
            area.draw(&PathElement::new([(x, y + 8), (x + 28, y + 8)], color.stroke_width(width)))?;
        }
        area.draw(&Circle::new((x + 14, y + 8), 4, color.filled()))?;
        write(area, results["paths"][path].as_str().ok_or("a path without a name")?, (x + 36, y), 14)?;
    }
    Ok(())
}

fn draw_layer(area: &Area<'_>, layer: &Value) -> Result<()> {
    let number = |key: &str| layer[key].as_u64().ok_or_else(|| format!("no {key}"));
    let (experts, local) = (number("experts")?, number("local_experts")?);
    let experts = if local < experts { format!("{local} of {experts}") } else { experts.to_string() };
    let title = format!(
        "{}: H {}, I {}, {experts} experts, {} per token",
        layer["name"].as_str().ok_or("no name")?,
        number("hidden")?,
        number("intermediate")?,
        number("topk")?
    );
    write(area, &title, (66, 4), 14)?;
    let (_, below) = area.split_vertically(22);
    // Both axes show powers of two, drawn by their exponents.
    let mut chart = ChartBuilder::on(&below)
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(54)
        .build_cartesian_2d(-0.4..12.8, 0.0..3.2)?;
    let power = |exponent: &f64| if exponent.fract() == 0.0 { format!("{}", exponent.exp2()) } else { String::new() };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .axis_desc_style(("sans-serif", 13).into_font().color(&INK))
        .x_labels(8)
        .y_labels(4)
        .x_label_formatter(&power)
        .y_label_formatter(&power)
        .x_desc("tokens")
        .y_desc("times the floor")
        .draw()?;
    let rows = layer["rows"].as_array().ok_or("no rows")?;
    for (path, color, width) in PATHS {
        let point = |row: &Value| {
            let (tokens, floor, time) = (row["tokens"].as_f64()?, row["floor"].as_f64()?, row[path].as_f64()?);
            Some((tokens.log2(), (time / floor).log2()))
        };
        let points: Vec<(f64, f64)> = rows.iter().filter_map(point).collect();
        if width > 0 {
            chart.draw_series([PathElement::new(points.clone(), color.stroke_width(width))])?;
        }
        chart.draw_series(points.into_iter().map(|point| Circle::new(point, 4, color.filled())))?;
    }
    Ok(())
}

fn write(area: &Area<'_>, text: &str, at: (i32, i32), size: i32) -> Result<()> {
    let style = ("sans-serif", size).into_font().color(&INK).pos(Pos::new(HPos::Left, VPos::Top));
    area.draw_text(text, &style, at)?;
    Ok(())
}
