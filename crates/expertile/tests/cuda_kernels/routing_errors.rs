//! Ids, map entries and routings that do not fit: nothing outside is touched, and the next wait says so.

use crate::case::{BASE, Case, Inputs, OnDevice, download, poisoned, with_layout};
use crate::on_device::device;
use crate::quantize_permute::{check_outputs, config, expected, lists};
use expertile::cuda::{QuantizePermute, QuantizePermuteCall, RowsPtrs, Stream};
use expertile::{Error, Plan};
use expertile_testkit::{POISON, assert_untouched};

#[test]
fn ids_past_the_limit_write_nothing_outside_and_are_reported_at_the_next_wait() {
    let Some(device) = device() else { return };
    for tokens in [64, 900] {
        let case = Case { tokens, hidden: 256, experts: 16, seed: 1101, ..BASE };
        let good = Inputs::new(&case);
        let mut bad = Inputs::new(&case);
        bad.ids[tokens * 8 - 3] = 1 << 20;
        bad.ids[5 * 8 + 2] = 16;
        let mut emptied = Inputs::new(&case);
        emptied.ids[tokens * 8 - 3] = -1;
        emptied.ids[5 * 8 + 2] = -1;
        let expected_bad = expected(&case, &emptied);
        let step = QuantizePermute::prepare(device, config(&case)).unwrap();
        let on = OnDevice::new(device, &case, &bad, step.workspace_bytes(&bad.plan).unwrap());
        unsafe {
            step.initialise_state(Stream(0), on.state.ptr()).unwrap();
            step.launch(Stream(0), &on.call(bad.plan)).unwrap();
            let error = step.check(Stream(0), &on.call(bad.plan)).unwrap_err();
            assert_eq!(error, Error::ExpertId { token: 5, slot: 2, id: 16, limit: 16 });
            check_outputs(&on, &case, &bad.plan, &expected_bad);
            step.check(Stream(0), &on.call(bad.plan)).unwrap();
            on.ids.upload_at(0, &good.ids.iter().map(|&id| id as i32).collect::<Vec<_>>()).unwrap();
            on.poison();
            step.launch(Stream(0), &on.call(good.plan)).unwrap();
            step.check(Stream(0), &on.call(good.plan)).unwrap();
            check_outputs(&on, &case, &good.plan, &expected(&case, &good));
        }
    }
}

#[test]
fn a_map_entry_past_the_experts_is_reported() {
    let Some(device) = device() else { return };
    let case = Case { tokens: 30, global: 40, experts: 10, hidden: 256, seed: 1201, ..BASE };
    let mut inputs = Inputs::new(&case);
    let map = inputs.map.as_mut().unwrap();
    let used = inputs.ids[11] as usize;
    map[used] = 10;
    let step = QuantizePermute::prepare(device, config(&case)).unwrap();
    let on = OnDevice::new(device, &case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
    assert!(on.map.is_some());
    unsafe {
        step.initialise_state(Stream(0), on.state.ptr()).unwrap();
        step.launch(Stream(0), &on.call(inputs.plan)).unwrap();
        let error = step.check(Stream(0), &on.call(inputs.plan)).unwrap_err();
        assert_eq!(error, Error::MapEntry { index: used, value: 10, local_experts: 10 });
    }
}

#[test]
fn a_routing_that_needs_more_rows_than_planned_stays_inside_and_is_reported() {
    let Some(device) = device() else { return };
    for tokens in [100, 1000] {
        let case = Case { tokens, topk: 4, experts: 8, hidden: 256, seed: 1301, alignment: 16, row_tile: 16, ..BASE };
        let mut inputs = Inputs::new(&case);
        let needed = with_layout(&inputs, 4, 8, |layout| layout.psum()[7].max(0) as usize).next_multiple_of(16);
        let small = needed / 2 / 16 * 16;
        inputs.plan = Plan::with_m_sum(tokens, 4, 8, 16, small).unwrap();
        let step = QuantizePermute::prepare(device, config(&case)).unwrap();
        let on = OnDevice::new(device, &case, &inputs, step.workspace_bytes(&inputs.plan).unwrap());
        // Whatever stands behind the rows must not change.
        let guarded = poisoned(device, needed * 256 * 2);
        let rows = RowsPtrs { out: guarded.ptr(), ..on.rows };
        unsafe {
            step.initialise_state(Stream(0), on.state.ptr()).unwrap();
            step.launch(Stream(0), &QuantizePermuteCall { rows, ..on.call(inputs.plan) }).unwrap();
            let error = step.check(Stream(0), &on.call(inputs.plan)).unwrap_err();
            assert_eq!(error, Error::MSum { m_sum: small, needed, alignment: 16 });
        }
        let after: Vec<u8> = download(&guarded, guarded.bytes());
        assert_untouched("memory past the rows", &after[small * 256..], POISON);
        let lists = lists(&on, &case, &inputs.plan);
        assert!(lists[..24].iter().all(|&row| (0..=small as i32).contains(&row)), "{:?}", &lists[..24]);
        assert!(lists[24 + small..].iter().all(|&row| row < small as i32));
    }
}
