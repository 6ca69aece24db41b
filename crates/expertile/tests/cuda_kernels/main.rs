//! The CUDA backend against the CPU backend, bit for bit. Every output is poisoned first and compared whole, gaps
//! included. Skips, and says so, on a machine without a device.
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]
// Every unsafe block here does one of two things: it hands a step the addresses of buffers that live until after the
// next wait and are as large as the step's own functions ask, or it calls the driver with handles made a few lines
// above.
#![allow(clippy::undocumented_unsafe_blocks)]
mod activation;
mod case;
mod graph;
mod hostile;
mod kept_cubins;
#[path = "../on_device/mod.rs"]
mod on_device;
mod permute;
mod quantize_permute;
mod routing_errors;
#[path = "../routings/mod.rs"]
mod routings;
mod unpermute;

use crate::activation::check_activation;
use crate::case::{BASE, Case, format};
use crate::on_device::device;
use crate::permute::check_permute_quantized;
use crate::quantize_permute::{check_quantize_permute, config};
use crate::unpermute::check_unpermute;
use expertile::cuda::QuantizePermute;
use expertile::{Activation, Group, Padding, ScaleLayout, ScaleRounding};
use expertile_testkit::Pattern;

#[test]
fn no_kernel_uses_local_memory_and_every_one_says_its_registers() {
    let Some(device) = device() else { return };
    let step = QuantizePermute::prepare(device, config(&BASE)).unwrap();
    for resources in step.resources() {
        println!("quantize_permute: {resources:?}");
        assert!(resources.local_bytes == 0 && resources.registers > 0);
    }
}

/// Small cases that take every kernel and both paths: what a run under compute-sanitizer can afford.
#[test]
fn sanitizer_runs_every_kernel_once() {
    let Some(device) = device() else { return };
    let packed = format(Group::G32, ScaleLayout::PackedUe8m0, ScaleRounding::PowerOfTwo);
    let row_major = format(Group::G128, ScaleLayout::RowMajor, ScaleRounding::Exact);
    for (tokens, format, padding, seed) in [
        (40, BASE.format, Padding::Zero, 1501),
        (300, packed, Padding::Untouched, 1502),
        (33, row_major, Padding::Zero, 1503),
    ] {
        let case = Case {
            tokens,
            format,
            padding,
            hidden: 640,
            experts: 37,
            alignment: 12,
            row_tile: 6,
            pattern: Pattern::Skewed,
            seed,
            ..BASE
        };
        check_quantize_permute(device, &case);
        check_permute_quantized(device, &case);
        check_unpermute(device, &case, true, true);
        check_activation(device, &Case { topk: 2, ..case }, Activation::default(), Some(format));
        check_activation(device, &Case { topk: 2, ..case }, Activation::default(), None);
    }
    // More than a cache holds.
    check_unpermute(
        device,
        &Case { tokens: 220, topk: 16, hidden: 14336, experts: 37, seed: 1506, ..BASE },
        true,
        true,
    );
    // Rows enough for every multiprocessor to have several.
    let many = Case { tokens: 520, topk: 2, experts: 5, hidden: 14336, seed: 1505, ..BASE };
    check_activation(device, &many, Activation::default(), Some(BASE.format));
    check_quantize_permute(device, &Case { tokens: 1200, hidden: 256, global: 90, experts: 30, seed: 1504, ..BASE });
}
