//! What goes wrong in this program, as the one line the user reads.

use std::fmt;

/// `Result` with a [`Failure`].
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// A message with the operation and its value. It ends the program with exit code 2, or a
/// candidate's run with a row that says so.
#[derive(Debug, Clone)]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Failure {
        Failure(message.into())
    }

    /// Names the operation an error came from: `.map_err(Failure::at("bind 127.0.0.1:80"))`.
    pub(crate) fn at<E: fmt::Display>(operation: impl fmt::Display) -> impl FnOnce(E) -> Failure {
        move |error| Failure(format!("{operation}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = self.0.split_whitespace();
        // One line whatever the source of the message was: scripts read standard error line by
        // line.
        if let Some(first) = words.next() {
            f.write_str(first)?;
        }
        words.try_for_each(|word| write!(f, " {word}"))
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_several_lines_prints_as_one() {
        assert_eq!(Failure::new("a:\n  b\n\nc").to_string(), "a: b c");
    }
}
