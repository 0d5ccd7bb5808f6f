//! How sums of money are written for a person: `44,383.00`.

use rust_decimal::Decimal;

/// Thousands grouped, at least two decimals, every digit kept.
pub fn grouped(amount: Decimal) -> String {
    let mut amount = amount.normalize();
    if amount.scale() < 2 {
        amount.rescale(2);
    }
    let text = amount.to_string();
    let (sign, digits) = text.strip_prefix('-').map_or(("", text.as_str()), |digits| ("-", digits));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "00"));
    format!("{sign}{}.{fraction}", group(whole))
}

/// A whole number with its thousands grouped.
pub fn grouped_count(count: u64) -> String {
    group(&count.to_string())
}

fn group(digits: &str) -> String {
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped_and_no_digit_is_lost() {
        for (given, shown) in [
            ("44383", "44,383.00"),
            ("44383.0", "44,383.00"),
            ("0", "0.00"),
            ("999.5", "999.50"),
            ("1000", "1,000.00"),
            ("-1234567.0625", "-1,234,567.0625"),
            ("99999999999999.9999", "99,999,999,999,999.9999"),
        ] {
            assert_eq!(grouped(given.parse().expect(given)), shown);
        }
        assert_eq!(grouped_count(1_000_000), "1,000,000");
        assert_eq!(grouped_count(12), "12");
    }
}
