//! How numbers and tables look.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, ContentArrangement, Table};

/// A table whose columns (but the first `text_columns`) hold numbers, set to the right.
pub(crate) fn table(header: &[&str], text_columns: usize, rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(text_columns) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

/// Bytes in the largest binary unit that leaves at least one of it.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = "B";
    for larger in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{count} B") } else { format!("{} {unit}", three_digits(value)) }
}

/// Bytes per second, in decimal units as memory is sold.
pub(crate) fn bytes_per_second(rate: f64) -> String {
    format!("{} GB/s", three_digits(rate / 1e9))
}

/// Operations per second.
pub(crate) fn flops_per_second(rate: f64) -> String {
    if rate < 1e13 {
        format!("{} GFLOP/s", three_digits(rate / 1e9))
    } else {
        format!("{} TFLOP/s", three_digits(rate / 1e12))
    }
}

/// Operations in the decimal unit that leaves at least one of it.
pub(crate) fn flops(count: u64) -> String {
    match count as f64 {
        flops if flops < 1e6 => format!("{} K", three_digits(flops / 1e3)),
        flops if flops < 1e9 => format!("{} M", three_digits(flops / 1e6)),
        flops if flops < 1e12 => format!("{} G", three_digits(flops / 1e9)),
        flops => format!("{} T", three_digits(flops / 1e12)),
    }
}

/// A time in the unit that leaves at least one of it, down to microseconds.
pub(crate) fn seconds(time: f64) -> String {
    match time {
        _ if time < 1e-3 => format!("{} us", three_digits(time * 1e6)),
        _ if time < 1.0 => format!("{} ms", three_digits(time * 1e3)),
        _ => format!("{} s", three_digits(time)),
    }
}

/// A share of one, in percent.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// How many experts there are here, and of how many.
pub(crate) fn experts(local: usize, global: usize) -> String {
    if local < global { format!("{local} of {global} experts") } else { format!("{local} experts") }
}

/// Three significant digits where there is a fraction to cut, whole numbers else.
pub(crate) fn three_digits(value: f64) -> String {
    match value {
        _ if value < 10.0 => format!("{value:.2}"),
        _ if value < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_the_unit_that_fits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.50 KiB");
        assert_eq!(bytes(100 << 20), "100 MiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
    }

    #[test]
    fn tables_set_numbers_to_the_right() {
        let text = table(&["name", "n"], 1, &[vec!["a".into(), "1".into()], vec!["bb".into(), "22".into()]]);
        assert!(text.contains("│ a    ┆  1 │") && text.contains("│ bb   ┆ 22 │"), "{text}");
    }
}
