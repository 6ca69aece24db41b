//! Routings made to break the kernels: ids and map entries of any value, empty and crowded experts, odd sizes. Whatever
//! they are, the outputs are the CPU's for the same routing with the bad slots empty, and `check` reports a bad one.
//!
//! `EXPERTILE_HOSTILE_LAUNCHES` sets how many routings are launched.

use crate::case::{BASE, Case, Inputs, OnDevice};
use crate::on_device::device;
use crate::quantize_permute::{check_outputs, config, expected};
use expertile::cuda::{QuantizePermute, Stream};
use expertile::{Error, Plan, TokenExperts};
use expertile_testkit::{Pattern, Random};

/// Launches of an ordinary run: a few seconds under the emulator.
const LAUNCHES: usize = 120;

/// An id that is rarely an expert's.
fn hostile_id(random: &mut Random, limit: usize, wide: bool) -> i64 {
    let edges = [limit as i64, limit as i64 + 1, -1, -2, i64::from(i32::MAX), i64::from(i32::MIN), 1 << 20];
    match random.below(4) {
        0 => edges[random.below(edges.len())],
        1 if wide => [i64::MIN, i64::MAX, 1 << 32, (1 << 32) + 1][random.below(4)],
        _ => random.below(limit) as i64,
    }
}

/// A call, and the same call with every bad slot empty.
fn draw(random: &mut Random, seed: u64) -> (Case, Inputs, Inputs, bool) {
    let topk = [1, 2, 3, 8, 32][random.below(5)];
    let most = [3, 40, 300][random.below(3)];
    let experts = 1 + random.below(most);
    let global = [0, experts + random.below(50)][random.below(2)];
    let case = Case {
        tokens: random.below(40),
        topk,
        experts,
        global,
        hidden: 128,
        alignment: [1, 4, 8, 12, 128][random.below(5)],
        row_tile: [1, 6, 16, 64][random.below(4)],
        pattern: [Pattern::Even, Pattern::Skewed, Pattern::One, Pattern::Empty][random.below(4)],
        wide_ids: random.below(2) == 0,
        // The tight plan.
        seed: 2 * seed + 1,
        ..BASE
    };
    let mut bad = Inputs::new(&case);
    bad.plan = Plan::tight(case.tokens, topk, experts, case.alignment, TokenExperts::MayRepeat).unwrap();
    let limit = if global > 0 { global } else { experts };
    for id in &mut bad.ids {
        if random.below(6) == 0 {
            *id = hostile_id(random, limit, case.wide_ids);
        }
    }
    for entry in bad.map.iter_mut().flatten() {
        if random.below(12) == 0 {
            *entry = [experts as i32, i32::MAX, i32::MIN, -7, 0][random.below(5)];
        }
    }
    let mut good = Inputs { ids: bad.ids.clone(), map: bad.map.clone(), x: bad.x.clone(), ..Inputs::new(&case) };
    (good.weights, good.plan) = (bad.weights.clone(), bad.plan);
    let mut is_bad = false;
    for id in &mut good.ids {
        let entry = match (&bad.map, usize::try_from(*id)) {
            (_, Err(_)) => continue,
            (_, Ok(at)) if at >= limit => None,
            (Some(map), Ok(at)) => Some(map[at]).filter(|&entry| entry < experts as i32),
            (None, Ok(_)) => Some(0),
        };
        if entry.is_none() {
            is_bad = true;
            *id = -1;
        }
    }
    for entry in good.map.iter_mut().flatten() {
        if *entry >= experts as i32 {
            *entry = -1;
        }
    }
    (case, bad, good, is_bad)
}

#[test]
fn hostile_routings_give_the_cpus_layout_without_the_bad_slots() {
    let Some(device) = device() else { return };
    let launches = std::env::var("EXPERTILE_HOSTILE_LAUNCHES").ok().and_then(|count| count.parse().ok());
    let (mut random, mut launched, mut seed, mut bad_calls) = (Random::new(9), 0, 0, 0);
    while launched < launches.unwrap_or(LAUNCHES) {
        seed += 1;
        let (case, bad, good, is_bad) = draw(&mut random, seed);
        let expected = expected(&case, &good);
        for single_launch_slots in [8192, 0] {
            let step =
                QuantizePermute::prepare(device, config(&case)).unwrap().with_single_launch_slots(single_launch_slots);
            let on = OnDevice::new(device, &case, &bad, step.workspace_bytes(&bad.plan).unwrap());
            let call = on.call(bad.plan);
            let checked = unsafe {
                step.initialise_state(Stream(0), on.state.ptr()).unwrap();
                step.launch(Stream(0), &call).unwrap();
                step.check(Stream(0), &call)
            };
            check_outputs(&on, &case, &bad.plan, &expected);
            match checked {
                Ok(()) => assert!(!is_bad, "a bad slot was not reported: {case:?}"),
                Err(Error::ExpertId { .. } | Error::MapEntry { .. }) => assert!(is_bad, "nothing was bad: {case:?}"),
                Err(error) => panic!("{error}: {case:?}"),
            }
            launched += 1;
        }
        bad_calls += usize::from(is_bad);
    }
    assert!(bad_calls > 0 && bad_calls < launched, "{bad_calls} of {launched} calls had a bad slot");
}
