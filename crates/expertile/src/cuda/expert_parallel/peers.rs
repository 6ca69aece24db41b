//! How ranks reach each other's windows: addresses within a process, handles between processes of a host.

use crate::cuda::driver::{Device, DeviceBuffer, DevicePtr, HANDLE_BYTES, PeerMemory, process_number};
use crate::error::Result;
use crate::exchange::Exchange;
use crate::expert_parallel::meeting::all_are_well;

/// What a rank tells of its window.
const CARD_BYTES: usize = 24 + HANDLE_BYTES;

/// Every rank's window, as this device sees it.
///
/// # Errors
/// [`crate::Error::OnRank`] on all ranks if one of them cannot reach another: they are then on other hosts, or have no
/// peer access.
pub(super) fn map_windows(
    device: &Device,
    exchange: &dyn Exchange,
    window: &DeviceBuffer,
) -> Result<(Vec<DevicePtr>, Vec<PeerMemory>)> {
    let (rank, ranks) = (exchange.rank(), exchange.ranks());
    let mut processes = vec![0; 8 * ranks];
    exchange.all_gather(&process_number().to_le_bytes(), &mut processes)?;
    let process = |rank: usize| u64_at(&processes, rank * 8);
    // Handles only where there is another process: a program of one may run where there are none.
    let between = (0..ranks).any(|other| process(other) != process(rank));
    let handle = if between { device.handle_of(window.ptr()) } else { Ok([0; HANDLE_BYTES]) };
    all_are_well(exchange, handle.as_ref().err())?;
    let mut card = Vec::with_capacity(CARD_BYTES);
    for number in [process(rank), window.ptr().address(), device.info().ordinal as u64] {
        card.extend_from_slice(&number.to_le_bytes());
    }
    card.extend_from_slice(&handle?);
    let mut cards = vec![0; CARD_BYTES * ranks];
    exchange.all_gather(&card, &mut cards)?;
    let open = |other: usize| {
        let card = &cards[other * CARD_BYTES..][..CARD_BYTES];
        if process(other) == process(rank) {
            device.reach(u64_at(card, 16) as usize, DevicePtr::new(u64_at(card, 8)))
        } else {
            device.open_handle(card[24..].try_into().expect("a handle's bytes"))
        }
    };
    let opened: Result<Vec<PeerMemory>> = (0..ranks).filter(|&other| other != rank).map(open).collect();
    all_are_well(exchange, opened.as_ref().err())?;
    let opened = opened?;
    let mut windows: Vec<DevicePtr> = opened.iter().map(PeerMemory::ptr).collect();
    windows.insert(rank, window.ptr());
    Ok((windows, opened))
}

fn u64_at(bytes: &[u8], start: usize) -> u64 {
    u64::from_le_bytes(bytes[start..start + 8].try_into().expect("eight bytes"))
}
