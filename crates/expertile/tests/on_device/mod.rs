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

/// Whether the device is the emulator, where a size that a GPU takes at once takes minutes.
pub(crate) fn is_emulated(device: &Device) -> bool {
    !device.info().name.starts_with("NVIDIA")
}

/// The emulator; elsewhere a line says that a test needs it.
pub(crate) fn emulator() -> Option<&'static Device> {
    let device = hopper()?;
    if !is_emulated(device) {
        skipped(format_args!("{} is not the emulator", device.info().name));
        return None;
    }
    Some(device)
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
