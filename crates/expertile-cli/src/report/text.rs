//! Text that may hold names out of hostile files, as a terminal only shows it.

use std::borrow::Cow;

/// Text that a terminal only shows, in one line of bearable length.
pub(crate) fn one_line(text: &str) -> String {
    const MOST: usize = 4000;
    let line = printable(text).replace('\n', "\\n");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ... ({} more bytes)", &line[..end], line.len() - end),
        None => line,
    }
}

/// Text that a terminal only shows: what would steer it is written as JSON writes it, so that JSON stays what it was.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    // Beside control characters, those that reorder the text around them.
    let steers = |c: char| {
        c != '\n' && c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            shown.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_is_shown_as_it_is() {
        assert_eq!(printable("a\nb é │"), "a\nb é │");
        assert_eq!(printable("\u{1b}[2J\r\u{7f}\u{9b}\u{202e}\0"), "\\u001b[2J\\u000d\\u007f\\u009b\\u202e\\u0000");
        assert_eq!(one_line("a\nb"), "a\\nb");
        let json = format!("{{\"a\":\"{}\"}}", printable("\u{9b}x"));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["a"], "\u{9b}x");
        assert!(one_line(&"é".repeat(10_000)).len() < 9000);
    }
}
