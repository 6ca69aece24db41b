//! Memory filled beforehand, so that what was written, and what was not, shows.

use std::fmt::Debug;

/// The byte of outputs that are compared whole: no kernel has a reason to write it.
pub const POISON: u8 = 0xa5;

/// The byte of buffers in which whatever is read before it is written has to show: NaN in every float type.
pub const NAN_POISON: u8 = 0xff;

/// Bytes to leave behind a buffer that nothing may touch.
pub const GUARD: usize = 4096;

/// Fails with the first byte that is not `poison` any more.
pub fn assert_untouched(what: &str, bytes: &[u8], poison: u8) {
    if let Some(at) = bytes.iter().position(|&byte| byte != poison) {
        let count = bytes.iter().filter(|&&byte| byte != poison).count();
        panic!("{what}[{at}] is {:#04x}, expected {poison:#04x} ({count} were written)", bytes[at]);
    }
}

/// Fails with the first place where two lists differ.
pub fn assert_same<T: PartialEq + Debug>(what: &str, case: &dyn Debug, actual: &[T], expected: &[T]) {
    assert_eq!(actual.len(), expected.len(), "{what} of {case:?}");
    let differs = |&at: &usize| actual[at] != expected[at];
    if actual != expected
        && let Some(at) = (0..actual.len()).find(differs)
    {
        let count = (0..actual.len()).filter(differs).count();
        panic!("{what}[{at}] is {:?}, expected {:?} ({count} differ) in {case:?}", actual[at], expected[at]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "guard[2] is 0x00, expected 0xa5 (1 were written)")]
    fn a_byte_that_was_written_is_named() {
        assert_untouched("guard", &[POISON; 4], POISON);
        assert_untouched("guard", &[POISON, POISON, 0, POISON], POISON);
    }

    #[test]
    #[should_panic(expected = "out[1] is 5, expected 4 (2 differ) in \"case 7\"")]
    fn the_first_difference_is_named() {
        assert_same("out", &"case 7", &[1, 2], &[1, 2]);
        assert_same("out", &"case 7", &[3, 5, 6], &[3, 4, 7]);
    }
}
