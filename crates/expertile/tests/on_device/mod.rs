//! What the tests that need a device have in common.
// Each test program takes its share.
#![allow(dead_code)]

use expertile::cuda::{Device, DeviceBuffer};
use std::fmt::Display;
use std::io::Write;
use std::sync::OnceLock;

/// Says why tests are skipped: past the test harness, which shows what a test prints only if it fails.
pub(crate) fn skipped(why: impl Display) {
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// The first device, opened once for the whole program; without one, a line says why, and `EXPERTILE_NEEDS_DEVICE`
/// makes that a failure.
pub(crate) fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let none = |error| {
        assert!(std::env::var_os("EXPERTILE_NEEDS_DEVICE").is_none(), "{error}");
        skipped(error);
    };
    DEVICE.get_or_init(|| Device::open(0).map_err(none).ok()).as_ref()
}

/// The same, if it is a Hopper.
pub(crate) fn hopper() -> Option<&'static Device> {
    let device = device()?;
    if device.info().capability != (9, 0) {
        skipped(format_args!("{} is no Hopper", device.info().name));
        return None;
    }
    Some(device)
}

/// Random numbers by xorshift, the same on every run.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// Evenly spread in [-1, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.next() >> 29) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Spread over many magnitudes.
    pub(crate) fn float(&mut self) -> f32 {
        let unit = self.next() as f32 / (1u64 << 53) as f32 - 0.5;
        unit * 2f32.powi(self.below(12) as i32 - 6)
    }
}

/// Device memory with its contents.
pub(crate) fn upload<T: bytemuck::NoUninit>(device: &Device, values: &[T]) -> DeviceBuffer {
    let buffer = device.allocate(size_of_val(values).max(16)).unwrap();
    buffer.upload_at(0, values).unwrap();
    buffer
}

/// Device memory full of one byte.
pub(crate) fn filled(device: &Device, bytes: usize, byte: u8) -> DeviceBuffer {
    let buffer = device.allocate(bytes.max(16)).unwrap();
    buffer.fill(byte).unwrap();
    buffer
}
