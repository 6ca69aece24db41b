//! The page that lists the families is written from the rows.

use super::*;
use std::fmt::Write;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/checkpoints.md");
const BEGIN: &str = "<!-- families: written by a test -->\n";
const END: &str = "<!-- end of families -->\n";

fn router(row: &RouterRow) -> String {
    let mut text = match row.scores {
        Scores::Softmax => "softmax".to_owned(),
        Scores::Sigmoid => "sigmoid".to_owned(),
        Scores::SqrtSoftplus => "root of softplus".to_owned(),
        Scores::SparseMixer(key) => format!("sparse mixer, `{key}`"),
    };
    if let Some(name) = row.logit_bias {
        let _ = write!(text, ", logits + `{name}`");
    }
    if let Some(CorrectionBias { name, flag }) = row.correction_bias {
        let _ = write!(text, ", chosen with `{name}`");
        flag.into_iter().for_each(|flag| write!(text, " if `{flag}`").unwrap());
    }
    match row.groups {
        GroupsRow::Never => {}
        GroupsRow::Always(_) | GroupsRow::OrOne(_) => text.push_str(", groups by their two best"),
        GroupsRow::IfMethod(method, _) => write!(text, ", groups by their best if `{method}`").unwrap(),
    }
    match row.normalize {
        Normalize::Never => {}
        Normalize::Always(_) | Normalize::AtLeast(..) => text.push_str(", normalized"),
        Normalize::Flag(key, _) => write!(text, ", normalized if `{key}`").unwrap(),
    }
    row.factor.into_iter().for_each(|key| write!(text, ", times `{key}`").unwrap());
    if let Some(ByToken { table, first }) = row.by_token {
        let _ = write!(text, "; in the first `{first}` layers `{table}` chooses");
    }
    text
}

fn shared(row: &SharedRow) -> String {
    let width = match row.width {
        Width::Key(key) => format!("`{key}` wide"),
        Width::Times(key) | Width::TimesOrOnce(key) => format!("`{key}` times an expert's width"),
        Width::Same => "an expert's width".to_owned(),
    };
    if row.gate.is_some() { format!("{width}, gated") } else { width }
}

/// The rows as a table.
fn table() -> String {
    let mut text = String::from(
        "| `model_type` | block | experts on disk | router | activation | shared expert |\n|---|---|---|---|---|---|\n",
    );
    for family in Family::all() {
        let types: Vec<String> = family.model_types.iter().map(|name| format!("`{name}`")).collect();
        let names = |names: &ExpertNames| match *names {
            ExpertNames::Each { gate: Some(gate), up, down } => format!("`experts.N.{{{gate},{up},{down}}}`"),
            ExpertNames::Each { gate: None, up, down } => format!("`experts.N.{{{up},{down}}}`"),
            ExpertNames::Fused { gate_up, biases, order, .. } => {
                let interleaved = if order == GateUpOrder::Interleaved { ", interleaved" } else { "" };
                format!("`{gate_up}`{interleaved}{}", if biases.is_some() { ", biases" } else { "" })
            }
        };
        let experts: Vec<String> = family.experts.iter().map(names).collect();
        let activation = match family.activation {
            ActivationRow::Gated(_) => "silu or gelu (tanh), gated",
            ActivationRow::Clamped => "clamped swiglu",
            ActivationRow::Limited(_) => "silu, gated, clamped",
            ActivationRow::Relu2(_) => "relu squared, no gate",
        };
        let on_input = if family.weight_on_input { ", weight on the input" } else { "" };
        let _ = writeln!(
            text,
            "| {} | `{}` | {} | {}{on_input} | {activation} | {} |",
            types.join(", "),
            family.block,
            experts.join(" or "),
            router(&family.router),
            family.shared.as_ref().map_or("none".into(), shared)
        );
    }
    text
}

/// `UPDATE_DOCS=1 cargo test -p expertile-checkpoint` writes the table.
#[test]
fn the_page_lists_every_family_as_its_row_says() {
    let page = std::fs::read_to_string(PAGE).unwrap();
    let (before, rest) = page.split_once(BEGIN).expect("the page has a place for the table");
    let (old, after) = rest.split_once(END).expect("the page has an end of the table");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(PAGE, format!("{before}{BEGIN}{}{END}{after}", table())).unwrap();
    } else {
        assert!(old == table(), "docs/checkpoints.md differs from the rows; UPDATE_DOCS=1 writes it anew");
    }
}
