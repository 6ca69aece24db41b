//! Weights of 4 bits: decoded exactly, arranged and given back, and what is refused.

use crate::case::*;
use crate::on_device::{filled, hopper, upload};
use crate::tiles::*;
use expertile::cuda::{DeviceBuffer, DevicePtr, Stream, Weights, WeightsBuilder};
use expertile::int4::Int4Scales;
use expertile::{ActivationFormat, Dtype, Error, MatrixRef, WeightFormat};
use expertile_testkit::POISON;
use half::{bf16, f16};

/// Rows that each pick one of K give the weights back: every nibble with every scale, folded in and not.
#[test]
fn every_weight_of_mxfp4_is_decoded_exactly() {
    let Some(device) = hopper() else { return };
    let (experts, n, k) = (4, 64, 256);
    for format in [W4A8, W4A16] {
        for kernel in
            [plain(16), narrow(32), broad(16), broad(32), broad(64), broad(128), plain(64), plain(128), plain(192)]
        {
            let case = Case { counts: vec![k; experts], alignment: 8, n, k, format, kernel, seed: 11 };
            let mut operands = Operands::new(&case);
            operands.rows.clear();
            for row in 0..experts * k {
                (0..k).for_each(|i| push_value(&mut operands.rows, format.rows, f32::from(u8::from(i == row % k))));
            }
            operands.row_scales.fill(1.0);
            // A nibble of each kind in every group; its scale is any (expert 0), the same in a row (1), as many steps
            // apart as are folded in (2), or a step more (3).
            let fold = if format.rows == ActivationFormat::E4m3 { 11 } else { 125 };
            for row in 0..experts * n {
                let (expert, output) = (row / n, row % n);
                for group in 0..k / 32 {
                    let at = row * (k / 32) + group;
                    operands.group_scales[at] = match expert {
                        0 => (8 * output + group) % 255,
                        1 => 4 * output + group % 2,
                        2 => 130 + output - (group * 5 + output) % (fold + 1),
                        _ => 130 + output - if group % 2 == 0 { fold + 1 } else { 0 },
                    } as u8;
                    for i in 0..16 {
                        operands.weights[16 * at + i] = ((i + group + output) % 16) as u8 | ((15 - i as u8) << 4);
                    }
                }
            }
            let out = Call::new(device, &case, &operands).run(operands.plan.m_sum(), n);
            for row in 0..experts * k {
                for output in 0..n {
                    let exact = operands.weight(format, (row / k * n + output) * k + row % k);
                    let found = bf16::from_bits(out[row * n + output]).to_f64();
                    // f32 ends at 2^128.
                    let expected = if exact.abs() < 2f64.powi(128) { exact } else { exact.signum() * f64::INFINITY };
                    assert!(
                        found == expected,
                        "expert {}, output {output}, k {}: {found}, expected {expected}, {kernel}, {format:?}",
                        row / k,
                        row % k
                    );
                }
            }
        }
    }
}

/// The same of int4: every nibble with scales all over both types, negative ones, subnormals and zeros among them.
#[test]
fn every_weight_of_int4_is_decoded_exactly() {
    let Some(device) = hopper() else { return };
    let (experts, n, k) = (4, 64, 256);
    for (format, are_f16) in [(INT4_A8, false), (INT4_A8, true), (INT4_A16, false), (INT4_A16, true)] {
        for kernel in [plain(16), narrow(32), broad(16), broad(32), broad(64), broad(128), plain(64), plain(192)] {
            let case = Case { counts: vec![k; experts], alignment: 8, n, k, format, kernel, seed: 11 };
            let mut operands = Operands::new(&case);
            operands.rows.clear();
            for row in 0..experts * k {
                (0..k).for_each(|i| push_value(&mut operands.rows, format.rows, f32::from(u8::from(i == row % k))));
            }
            operands.row_scales.fill(1.0);
            operands.int4_scales.are_f16 = are_f16;
            for (at, bits) in operands.int4_scales.bits.iter_mut().enumerate() {
                let exponent = if are_f16 { 0x7c00 } else { 0x7f80 };
                // 2048 of all 65536.
                *bits = (at * 32 + at * 7 % 32) as u16;
                if *bits & exponent == exponent {
                    *bits &= !exponent;
                }
                for i in 0..16 {
                    operands.weights[16 * at + i] = ((i + at) % 16) as u8 | (15 - i as u8) << 4;
                }
            }
            let out = Call::new(device, &case, &operands).run(operands.plan.m_sum(), n);
            for row in 0..experts * k {
                for output in 0..n {
                    let exact = operands.weight(format, (row / k * n + output) * k + row % k);
                    // f32 holds it, or ends before.
                    let expected = bf16::from_f32(exact as f32);
                    let found = bf16::from_bits(out[row * n + output]);
                    assert!(
                        found == expected,
                        "expert {}, output {output}, k {}: {found}, expected {expected}, {kernel}, {format:?}, {are_f16}",
                        row / k,
                        row % k
                    );
                }
            }
        }
    }
}

#[test]
fn int4_weights_that_are_not_arranged_or_not_numbers_are_refused() {
    let Some(device) = hopper() else { return };
    for (seed, name, infinity) in [(13, "bf16", 0xff80), (14, "f16", 0x7c00)] {
        let (format, kernel, sizes) = (INT4_A8, plain(16), (2, 72, 96));
        let case = Case { counts: vec![3, 4], alignment: 8, n: 72, k: 96, format, kernel, seed };
        let mut operands = Operands::new(&case);
        let call = Call::new(device, &case, &operands);
        let plain_weights = operands.int4_scales.upload(device, &operands.weights, sizes).unwrap();
        assert_eq!(plain_weights.bytes(), 2 * 72 * (48 + 6));
        let refuse = |weights: &Weights, actual: &str| {
            let error = unsafe { call.gemm.launch(Stream(0), &call.operands.call(weights)) }.unwrap_err().to_string();
            let expected = format!("weights is packed as {actual}, expected int4 arranged for e4m3 rows");
            assert_eq!(error, expected);
        };
        refuse(&plain_weights, "int4, not arranged");
        let for_bf16 = plain_weights.clone().arrange(device, ActivationFormat::Bf16).unwrap();
        refuse(&for_bf16, "int4 arranged for rows of another format");
        assert!(matches!(for_bf16.arrange(device, ActivationFormat::E4m3), Err(Error::WeightFormat { .. })));
        operands.int4_scales.bits[(72 + 5) * 3 + 2] = infinity;
        let start = format!("scales is {infinity}, expected the bits of a finite {name}: ");
        let error = operands.int4_scales.upload(device, &operands.weights, sizes).unwrap_err().to_string();
        assert!(error.starts_with(&start) && error.contains("row 77, group 2"), "{error}");
        let [blocks, scales] = [upload(device, &operands.weights), upload(device, &operands.int4_scales.bits)];
        let in_place =
            |sizes, scale_type| unsafe { Weights::from_device_int4(sizes, blocks.ptr(), (scale_type, scales.ptr())) };
        let scale_type = if name == "f16" { Dtype::F16 } else { Dtype::Bf16 };
        let weights = in_place(sizes, scale_type).unwrap();
        let error = weights.arrange(device, ActivationFormat::E4m3).unwrap_err().to_string();
        assert!(error.starts_with(&start) && error.contains("row 5 of expert 1"), "{error}");
        let error = in_place((2, 72, 48), scale_type).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "k", actual: 48, .. }), "{error}");
        let error = in_place(sizes, Dtype::F32).unwrap_err();
        assert!(matches!(error, Error::Dtype { argument: "scales", actual: Dtype::F32, .. }), "{error}");
        let error = operands.int4_scales.upload(device, &operands.weights[1..], sizes).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "blocks", .. }), "{error}");
    }
    let mut builder = WeightsBuilder::new(device, WeightFormat::Int4, (2, 32, 128)).unwrap();
    let blocks = MatrixRef::new(&[0u8; 1024], 16, 64).unwrap();
    let bf16s = MatrixRef::new(&[bf16::ONE; 64], 16, 4).unwrap();
    let f16s = MatrixRef::new(&[f16::ONE; 64], 16, 4).unwrap();
    builder.add_int4_rows(0, 16, blocks, Int4Scales::F16(f16s)).unwrap();
    let error = builder.add_int4_rows(0, 0, blocks, Int4Scales::Bf16(bf16s)).unwrap_err().to_string();
    assert_eq!(error, "scales is packed as bf16, expected f16, as those before");
    let error = builder.add_int4_rows(0, 16, blocks, Int4Scales::F16(f16s)).unwrap_err();
    assert!(matches!(error, Error::Count { argument: "added_rows", .. }), "{error}");
    builder.add_int4_rows(0, 0, blocks, Int4Scales::F16(f16s)).unwrap();
    assert!(matches!(builder.finish(), Err(Error::Count { argument: "added_rows", expert: 1, .. })));
    let error = WeightsBuilder::new(device, WeightFormat::Int4, (2, 32, 48)).unwrap_err();
    assert!(error.to_string().starts_with("k is 48, expected a positive multiple of 32 for int4"), "{error}");
    let error = Weights::arranged_bytes(WeightFormat::Bf16, (2, 32, 64)).unwrap_err();
    assert!(matches!(error, Error::WeightFormat { argument: "format", actual: "bf16", .. }), "{error}");
}

#[test]
fn mxfp4_weights_that_are_not_arranged_or_not_numbers_are_refused() {
    let Some(device) = hopper() else { return };
    let case = Case { counts: vec![3, 4], alignment: 8, n: 72, k: 96, format: W4A8, kernel: plain(16), seed: 12 };
    let mut operands = Operands::new(&case);
    let call = Call::new(device, &case, &operands);
    let sizes = (2, 72, 96);
    let upload_weights = |scales: &[u8]| Weights::upload_mxfp4(device, &operands.weights, scales, sizes);
    let plain_weights = upload_weights(&operands.group_scales).unwrap();
    assert_eq!(plain_weights.bytes(), 2 * 72 * (48 + 3));
    let refuse = |weights: &Weights| {
        let error = unsafe { call.gemm.launch(Stream(0), &call.operands.call(weights)) }.unwrap_err();
        assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }), "{error}");
    };
    refuse(&plain_weights);
    let for_bf16 = plain_weights.clone().arrange(device, ActivationFormat::Bf16).unwrap();
    refuse(&for_bf16);
    assert!(matches!(for_bf16.arrange(device, ActivationFormat::E4m3), Err(Error::WeightFormat { .. })));
    let scales = &mut operands.group_scales;
    scales[(72 + 5) * 3 + 2] = 255;
    let nan = scales.clone();
    let error = Weights::upload_mxfp4(device, &operands.weights, &nan, sizes).unwrap_err();
    assert!(error.to_string().contains("row 5, group 2"), "{error}");
    let [blocks, scales] = [upload(device, &operands.weights), upload(device, &nan)];
    let in_place = unsafe { Weights::from_device_mxfp4(sizes, blocks.ptr(), scales.ptr()) }.unwrap();
    let error = in_place.arrange(device, ActivationFormat::E4m3).unwrap_err();
    assert!(error.to_string().contains("row 5 of expert 1"), "{error}");
    let error = unsafe { Weights::from_device_mxfp4((2, 72, 48), blocks.ptr(), scales.ptr()) }.unwrap_err();
    assert!(matches!(error, Error::Value { argument: "k", actual: 48, .. }), "{error}");
    let error = Weights::upload_mxfp4(device, &operands.weights[1..], &nan, sizes).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "blocks", .. }), "{error}");
}

/// 4.25 bits to a weight, of int4 4.5, and at most 2 % more.
#[test]
fn arranged_weights_take_their_bits() {
    let Some(device) = hopper() else { return };
    for (experts, n, k) in [(2, 5760, 2880), (2, 2880, 2880), (1, 512, 7168), (3, 7168, 256)] {
        let (blocks, scales) = (vec![0x21; experts * n * k / 2], vec![127; experts * n * k / 32]);
        for rows in ActivationFormat::ALL {
            let weights = Weights::upload_mxfp4(device, &blocks, &scales, (experts, n, k)).unwrap();
            let bytes = weights.arrange(device, rows).unwrap().bytes() as f64;
            let least = (experts * n * k) as f64 * 4.25 / 8.0;
            assert!((1.0..1.02).contains(&(bytes / least)), "{n} x {k}: {bytes} of {least}");
            let scales = Int4Bits { are_f16: false, bits: vec![0x3f80; experts * n * k / 32] };
            let weights = scales.upload(device, &blocks, (experts, n, k)).unwrap();
            let bytes = weights.arrange(device, rows).unwrap().bytes() as f64;
            let least = (experts * n * k) as f64 * 4.5 / 8.0;
            assert!((1.0..1.02).contains(&(bytes / least)), "int4 {n} x {k}: {bytes} of {least}");
        }
    }
}

/// In memory of the caller's, and back: blocks bit for bit, scales but for those of zeros. Also where the last unit and
/// the last slab are partial, and where scales are too far apart to be folded in.
#[test]
fn arranged_mxfp4_gives_back_what_it_was_made_of() {
    let Some(device) = hopper() else { return };
    for (format, n, k, seed) in [(W4A8, 200, 160, 3), (W4A8, 64, 64, 4), (W4A16, 200, 160, 5), (W4A16, 8, 32, 6)] {
        let experts = 5;
        let case = Case { counts: vec![1; experts], alignment: 8, n, k, format, kernel: plain(16), seed };
        let Operands { weights: blocks, group_scales: scales, .. } = Operands::new(&case);
        let sizes = (experts, n, k);
        let plain_weights = || Weights::upload_mxfp4(device, &blocks, &scales, sizes).unwrap();
        let bytes = Weights::arranged_bytes(WeightFormat::Mxfp4, sizes).unwrap();
        let memory = filled(device, bytes + 256, POISON);
        let arrange = |at: DevicePtr| unsafe { plain_weights().arrange_in(device, Stream(0), format.rows, at) };
        let error = arrange(memory.ptr().byte_add(64)).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "memory", .. }), "{error}");
        let arranged = arrange(memory.ptr()).unwrap();
        assert_eq!((arranged.bytes(), arranged.values()), (bytes, memory.ptr()));
        let mut beyond = vec![0u8; 256];
        memory.download_at(bytes, &mut beyond).unwrap();
        assert!(beyond.iter().all(|&byte| byte == POISON));

        let found_blocks = filled(device, blocks.len() + 16, POISON);
        let found_scales = filled(device, scales.len() + 16, POISON);
        let read = |buffer: &DeviceBuffer| {
            let mut bytes = vec![0u8; buffer.bytes()];
            buffer.download_at(0, &mut bytes).unwrap();
            bytes
        };
        let unpack =
            |weights: &Weights, scales| unsafe { weights.unpack_mxfp4(device, Stream(0), found_blocks.ptr(), scales) };
        let error = unpack(&plain_weights(), None).unwrap_err();
        assert!(matches!(error, Error::WeightFormat { argument: "weights", .. }), "{error}");
        unpack(&arranged, None).unwrap();
        let (found, rest) = (read(&found_blocks), read(&found_scales));
        assert!(found[..blocks.len()] == blocks, "{n} x {k}");
        assert!(found[blocks.len()..].iter().chain(&rest).all(|&byte| byte == POISON));
        unpack(&arranged, Some(found_scales.ptr())).unwrap();
        let found = read(&found_scales);
        assert!(found[scales.len()..].iter().all(|&byte| byte == POISON));
        for (group, (&found, &scale)) in found.iter().zip(&scales).enumerate() {
            let zeros = blocks[group * 16..][..16].iter().all(|byte| byte & 0x77 == 0);
            assert!(zeros || found == scale, "group {group} of {n} x {k}: {found}, expected {scale}");
        }
    }
}

/// The same of int4, of which scales are kept bit for bit, too.
#[test]
fn arranged_int4_gives_back_what_it_was_made_of() {
    let Some(device) = hopper() else { return };
    for (format, n, k, seed) in
        [(INT4_A8, 200, 160, 3), (INT4_A8, 64, 64, 4), (INT4_A16, 200, 160, 5), (INT4_A16, 8, 32, 6)]
    {
        let experts = 5;
        let case = Case { counts: vec![1; experts], alignment: 8, n, k, format, kernel: plain(16), seed };
        let Operands { weights: blocks, int4_scales: scales, .. } = Operands::new(&case);
        let plain_weights = || scales.upload(device, &blocks, (experts, n, k)).unwrap();
        let bytes = Weights::arranged_bytes(WeightFormat::Int4, (experts, n, k)).unwrap();
        let memory = filled(device, bytes + 256, POISON);
        let arranged = unsafe { plain_weights().arrange_in(device, Stream(0), format.rows, memory.ptr()) }.unwrap();
        assert_eq!((arranged.bytes(), arranged.values()), (bytes, memory.ptr()));
        let mut beyond = vec![0u8; 256];
        memory.download_at(bytes, &mut beyond).unwrap();
        assert!(beyond.iter().all(|&byte| byte == POISON));

        let found_blocks = filled(device, blocks.len() + 16, POISON);
        let found_scales = filled(device, 2 * scales.bits.len() + 16, POISON);
        let read = |buffer: &DeviceBuffer| {
            let mut bytes = vec![0u8; buffer.bytes()];
            buffer.download_at(0, &mut bytes).unwrap();
            bytes
        };
        let unpack =
            |weights: &Weights, scales| unsafe { weights.unpack_int4(device, Stream(0), found_blocks.ptr(), scales) };
        assert!(matches!(
            unpack(&plain_weights(), None),
            Err(Error::WeightFormat { actual: "int4, not arranged", .. })
        ));
        unpack(&arranged, None).unwrap();
        let (found, rest) = (read(&found_blocks), read(&found_scales));
        assert!(found[..blocks.len()] == blocks, "{n} x {k}");
        assert!(found[blocks.len()..].iter().chain(&rest).all(|&byte| byte == POISON));
        unpack(&arranged, Some(found_scales.ptr())).unwrap();
        let found = read(&found_scales);
        let expected: Vec<u8> = scales.bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        assert!(found[..expected.len()] == expected, "{n} x {k}");
        assert!(found[expected.len()..].iter().all(|&byte| byte == POISON));
        let error = unsafe { arranged.unpack_mxfp4(device, Stream(0), found_blocks.ptr(), None) }.unwrap_err();
        assert!(matches!(error, Error::WeightFormat { actual: "int4", expected: "arranged mxfp4", .. }), "{error}");
    }
}
