//! `expertile doctor`, as a user meets it.

mod common;

use common::{fail, json, succeed};
use std::path::Path;

#[test]
fn doctor_says_what_the_machine_offers() {
    let report = json(Path::new("."), &["doctor"]);
    let available = report["isa_available"].as_array().unwrap();
    assert_eq!(available[0], "portable");
    assert!(available.contains(&report["isa_chosen"]));
    assert!(report["threads"].as_u64().unwrap() >= 1);
    for key in ["read_bytes_per_second", "copy_bytes_per_second"] {
        assert!(report[key].as_f64().unwrap() > 1e7, "{key}");
    }
    assert!(report["gpu"].is_string() || report["gpu_reason"].is_string());
    let text = succeed(Path::new("."), &["doctor"]);
    for part in ["instruction sets", "threads", "memory read", "GB/s", "GFLOP/s", "gpu"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    fail(Path::new("."), &["doctor", "--nonsense"], 2);
}
