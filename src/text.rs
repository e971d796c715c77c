//! Makes text that is not trusted (of images, registries, runtimes, shims and job files) safe to show to people: in a
//! gRPC status, a task event, a log line or on a terminal.
//!
//! Nomad stores events in its replicated state and prints them unescaped. A megabyte of text would therefore cost every
//! server a megabyte, and an escape sequence would reach the operator's terminal. Long text is cut in the middle,
//! because its beginning says what was tried and its end says why it failed.

use std::fmt;

/// The longest untrusted text within a message, in characters.
pub const EXCERPT_MAX: usize = 500;

/// The longest message, in characters.
pub const MESSAGE_MAX: usize = 2000;

/// Escapes the characters that terminals and log readers interpret, and cuts text longer than `max` characters in the
/// middle. The note that says how much was cut is not counted.
pub fn sanitize(text: &str, max: usize) -> String {
    escape_and_cut(text.chars().map(ShownChar::plain), text.len(), max)
}

/// Puts an untrusted text in quotes, escaped and cut to [`EXCERPT_MAX`].
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", escape_and_cut(text.chars().map(ShownChar::quoted), text.len(), EXCERPT_MAX))
}

/// Returns whether a terminal prints every character of a text literally.
pub fn is_printable(text: &str) -> bool {
    !text.contains(is_interpreted)
}

/// Returns whether a terminal or a log reader interprets this character instead of printing it.
///
/// These are the control characters of both sets (ISO 6429), line separators, the characters that change the order in
/// which other characters are shown ("Trojan Source", CVE-2021-42574), and invisible characters.
fn is_interpreted(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// One character in the form in which it is shown.
#[derive(Clone, Copy)]
enum ShownChar {
    Plain(char),
    Escaped(char),
}

impl ShownChar {
    fn plain(c: char) -> Self {
        if is_interpreted(c) { Self::Escaped(c) } else { Self::Plain(c) }
    }

    fn quoted(c: char) -> Self {
        if matches!(c, '"' | '\\') { Self::Escaped(c) } else { Self::plain(c) }
    }

    /// Returns how many characters the shown form has.
    fn width(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Escaped(c) => c.escape_default().len(),
        }
    }

    /// Returns how many bytes the character has in the original text.
    fn bytes(self) -> usize {
        match self {
            Self::Plain(c) | Self::Escaped(c) => c.len_utf8(),
        }
    }
}

impl fmt::Display for ShownChar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(c) => fmt::Write::write_char(f, *c),
            Self::Escaped(c) => c.escape_default().fmt(f),
        }
    }
}

/// Joins the characters of a text of `length` bytes, and cuts the middle out of a text longer than `max` characters.
/// The function reads no more characters than can be shown, since the text may have megabytes.
fn escape_and_cut(pieces: impl DoubleEndedIterator<Item = ShownChar> + Clone, length: usize, max: usize) -> String {
    fn fitting(pieces: impl Iterator<Item = ShownChar>, room: usize) -> Vec<ShownChar> {
        let mut used = 0;
        pieces
            .take_while(|piece| {
                used += piece.width();
                used <= room
            })
            .collect()
    }
    let join = |pieces: &[ShownChar]| pieces.iter().map(ShownChar::to_string).collect::<String>();
    let bytes = |pieces: &[ShownChar]| pieces.iter().map(|piece| piece.bytes()).sum::<usize>();
    let whole = fitting(pieces.clone(), max);
    if bytes(&whole) == length {
        return join(&whole);
    }
    let head = fitting(pieces.clone(), max - max / 3);
    let mut tail = fitting(pieces.rev(), max / 3);
    tail.reverse();
    let left_out = length.saturating_sub(bytes(&head) + bytes(&tail));
    format!("{} [{left_out} bytes left out] {}", join(&head), join(&tail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_terminals_act_on_is_escaped() {
        assert_eq!(sanitize("a\r\nb\tc\u{1b}[31m\u{7}", 99), "a\\r\\nb\\tc\\u{1b}[31m\\u{7}");
        assert_eq!(
            sanitize("\u{9b}2J \u{202e}txt.exe \u{2066}\u{feff}", 99),
            "\\u{9b}2J \\u{202e}txt.exe \\u{2066}\\u{feff}"
        );
        assert_eq!(
            sanitize("häßlich \"日本\" \\n", 99),
            "häßlich \"日本\" \\n",
            "printable characters stay as they are"
        );
        assert_eq!(quoted("a\"b\\c\n"), r#""a\"b\\c\n""#);
    }

    #[test]
    fn beginning_and_end_stay() {
        let text = format!("exec {}: no such file", "x".repeat(1 << 20));
        let cut = sanitize(&text, 60);
        assert!(cut.starts_with("exec xxx") && cut.ends_with("xx: no such file"), "{cut}");
        assert!(cut.contains(" [1048535 bytes left out] ") && cut.len() < 100, "{cut}");
        assert_eq!(sanitize("twelve bytes", 12), "twelve bytes");
        assert_eq!(sanitize("", 0), "");
    }

    proptest! {
        #[test]
        fn nothing_is_longer_than_allowed_or_acted_on(text in ".{0,80}", most in 0_usize..60) {
            let cut = sanitize(&text, most);
            let mark = " [ bytes left out] ".len() + 6;
            prop_assert!(cut.chars().count() <= most + mark, "{cut:?}");
            prop_assert!(!cut.chars().any(is_interpreted), "{cut:?}");
            prop_assert_eq!(sanitize(&cut, usize::MAX - 1), cut, "a second time changes nothing");
        }
    }
}
