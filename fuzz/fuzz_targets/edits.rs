//! Damage to a file that is whole: a fuzzer that starts from noise seldom gets past a header.

use arbitrary::Arbitrary;

/// One change to some bytes.
#[derive(Arbitrary, Debug)]
pub enum Edit {
    /// Another byte.
    Set {
        /// Where, modulo the length.
        at: u16,
        /// What.
        byte: u8,
    },
    /// More bytes.
    Insert {
        /// Before which byte, modulo the length.
        at: u16,
        /// What.
        bytes: [u8; 2],
    },
    /// Fewer bytes.
    Remove {
        /// From where, modulo the length.
        at: u16,
        /// How many, at most.
        count: u8,
    },
    /// A digit, so that numbers in JSON change and stay numbers.
    Digit {
        /// From where to look for one, modulo the length.
        at: u16,
        /// Which.
        digit: u8,
    },
}

/// Applies the edits in order.
pub fn apply(edits: &[Edit], bytes: &mut Vec<u8>) {
    for edit in edits {
        let place = |at: u16| usize::from(at) % bytes.len().max(1);
        match *edit {
            _ if bytes.is_empty() => return,
            Edit::Set { at, byte } => {
                let at = place(at);
                bytes[at] = byte;
            }
            Edit::Insert { at, bytes: more } => {
                let at = place(at);
                bytes.splice(at..at, more);
            }
            Edit::Remove { at, count } => {
                let at = place(at);
                let end = bytes.len().min(at + usize::from(count));
                bytes.drain(at..end);
            }
            Edit::Digit { at, digit } => {
                let at = place(at);
                if let Some(found) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *found = b'0' + digit % 10;
                }
            }
        }
    }
}
