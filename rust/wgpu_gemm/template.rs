//! Makes one WGSL text of a source and its constants.
//!
//! WGSL has no preprocessor, and loops over registers must not be left to a driver's unrolling. Three things are
//! enough: `{NAME}` is a constant, `#if NAME … #else … #endif` keeps lines where it is not zero, and
//! `#for i in 0..NAME … #end` repeats lines with `{i}` in them. Sums and products of the form `{i+4}` and
//! `{i*NAME/4}` are computed, from left to right.

use std::fmt::Write;

/// A constant's name and text.
pub type Constant = (&'static str, String);

/// The source with everything above expanded.
///
/// # Panics
/// Sources are part of the crate: an unknown name or an unfinished block is a mistake in one of them.
pub fn expand(source: &str, constants: &[Constant]) -> String {
    let mut out = String::with_capacity(2 * source.len());
    let scope: Vec<(&str, String)> = constants.iter().map(|(name, text)| (*name, text.clone())).collect();
    block(&source.lines().collect::<Vec<_>>(), &scope, &mut out);
    out
}

fn block(lines: &[&str], scope: &[(&str, String)], out: &mut String) {
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at];
        if let Some(name) = line.strip_prefix("#if ") {
            let end = matching(lines, at, "#if ", "#endif");
            let middle = else_of(&lines[..end], at);
            if number(name.trim(), scope) != 0 {
                block(&lines[at + 1..middle], scope, out);
            } else if middle < end {
                block(&lines[middle + 1..end], scope, out);
            }
            at = end;
        } else if let Some(head) = line.strip_prefix("#for ") {
            let end = matching(lines, at, "#for ", "#end");
            let (name, range) = head.split_once(" in 0..").expect("#for NAME in 0..COUNT");
            for i in 0..number(range.trim(), scope) {
                let mut inner = scope.to_vec();
                inner.push((name, i.to_string()));
                block(&lines[at + 1..end], &inner, out);
            }
            at = end;
        } else {
            substitute(line, scope, out);
        }
        at += 1;
    }
}

/// The line that ends the block which starts at `from`.
fn matching(lines: &[&str], from: usize, open: &str, close: &str) -> usize {
    let mut depth = 0;
    for (i, line) in lines.iter().enumerate().skip(from) {
        depth += usize::from(line.starts_with(open));
        if line.trim_end() == close {
            depth -= 1;
            if depth == 0 {
                return i;
            }
        }
    }
    panic!("{} has no {close}", lines[from]);
}

/// The `#else` of the `#if` at `from`, or the end.
fn else_of(lines: &[&str], from: usize) -> usize {
    let mut depth = 0;
    for (i, line) in lines.iter().enumerate().skip(from) {
        depth += usize::from(line.starts_with("#if "));
        depth -= usize::from(line.trim_end() == "#endif");
        if depth == 1 && line.trim_end() == "#else" {
            return i;
        }
    }
    lines.len()
}

fn substitute(line: &str, scope: &[(&str, String)], out: &mut String) {
    let mut rest = line;
    while let Some(open) = rest.find('{') {
        out.push_str(&rest[..open]);
        rest = &rest[open + 1..];
        let name = |c: char| c.is_ascii_alphanumeric() || "_+*/".contains(c);
        match rest.find(|c| !name(c)) {
            Some(close) if close > 0 && rest[close..].starts_with('}') => {
                let expression = &rest[..close];
                match text(expression, scope) {
                    Some(text) => out.push_str(text),
                    None => write!(out, "{}", number(expression, scope)).expect("strings take all"),
                }
                rest = &rest[close + 1..];
            }
            _ => out.push('{'),
        }
    }
    out.push_str(rest);
    out.push('\n');
}

fn text<'a>(name: &str, scope: &'a [(&str, String)]) -> Option<&'a str> {
    scope.iter().rev().find(|(known, _)| *known == name).map(|(_, text)| text.as_str())
}

/// A number, a name, or a chain of those with `+`, `*` and `/`.
fn number(expression: &str, scope: &[(&str, String)]) -> u32 {
    let (mut total, mut operator, mut rest) = (0, '+', expression);
    loop {
        let end = rest.find(['+', '*', '/']).unwrap_or(rest.len());
        let term = text(&rest[..end], scope).unwrap_or(&rest[..end]);
        let value: u32 = term.parse().unwrap_or_else(|_| panic!("{term:?} is no number and no name"));
        total = match operator {
            '+' => total + value,
            '*' => total * value,
            _ => total / value,
        };
        match rest[end..].chars().next() {
            Some(next) => (operator, rest) = (next, &rest[end + 1..]),
            None => return total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_nest_and_names_are_replaced() {
        let source = "#for i in 0..N\n#if A\nx_{i+1} {B}\n#else\ny\n#endif\n#end\nfn f() { z{i*2/4} }";
        let constants =
            |a: u32| [("N", "2".into()), ("A", a.to_string()), ("B", "b, c".into()), ("i", "6".into())];
        assert_eq!(expand(source, &constants(1)), "x_1 b, c\nx_2 b, c\nfn f() { z3 }\n");
        assert_eq!(expand(source, &constants(0)), "y\ny\nfn f() { z3 }\n");
    }
}
