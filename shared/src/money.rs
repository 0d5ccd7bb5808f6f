//! Money: exact decimals from the request to the ledger, never a float.

use std::fmt;

use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::value::RawValue;

/// More digits behind the point than any currency has (ISO 4217 goes to 4: CLF, UYW).
const MAX_DECIMALS: u32 = 4;
/// What the column's check allows, exclusive: 10^14.
const LIMIT: Decimal = Decimal::from_parts(0x107A_4000, 0x5AF3, 0, false, 0);
/// Longer than any number that could still be in range; stops hostile megabytes early.
const MAX_TEXT: usize = 64;

/// An amount or a price: 0 or more, below 10^14, at most 4 decimals. Keeps the digits it was
/// given: `59.90` stays `59.90`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Money(Decimal);

/// The price of a line: money, or less than 0 for what is taken off (a coupon in a marketplace's payload).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Price(Decimal);

/// Why a text is no amount of money.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    #[error("must be a decimal number such as 59.98, as a JSON number or a string")]
    NotANumber,
    #[error("must not be negative")]
    Negative,
    #[error("must have at most {MAX_DECIMALS} decimals")]
    TooPrecise,
    #[error("must be below 10^14")]
    TooLarge,
}

impl Money {
    pub const ZERO: Self = Self(Decimal::ZERO);

    /// Reads the text of a JSON number (RFC 8259, section 6).
    pub fn parse(text: &str) -> Result<Self, MoneyError> {
        Price::parse(text)?.try_into()
    }

    /// 1, 2, 3.00, …
    #[must_use]
    pub fn is_whole_and_positive(self) -> bool {
        self.0.is_integer() && !self.0.is_zero()
    }

    /// Can it be written with so many decimals?
    #[must_use]
    pub fn fits(self, decimals: u32) -> bool {
        self.0.scale() <= decimals || self.0.normalize().scale() <= decimals
    }

    /// As bytes that are the same for `5.1` and `5.10`.
    #[must_use]
    pub fn value_bytes(self) -> [u8; 16] {
        self.0.normalize().serialize()
    }

    #[must_use]
    pub fn decimal(self) -> Decimal {
        self.0
    }
}

impl Price {
    pub const ZERO: Self = Self(Decimal::ZERO);

    /// Reads the text of a JSON number.
    pub fn parse(text: &str) -> Result<Self, MoneyError> {
        if text.len() > MAX_TEXT {
            return Err(MoneyError::TooPrecise);
        }
        if !is_json_number(text) {
            return Err(MoneyError::NotANumber);
        }
        let parsed =
            if text.contains(['e', 'E']) { Decimal::from_scientific(text) } else { Decimal::from_str_exact(text) };
        let value = parsed.map_err(|_| {
            let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, ""));
            if !exponent.starts_with('-') && (!exponent.is_empty() || !mantissa.contains('.')) {
                MoneyError::TooLarge
            } else {
                MoneyError::TooPrecise
            }
        })?;
        Self::try_from(value)
    }

    /// This price for so many pieces; `None` where the product leaves the range of money.
    #[must_use]
    pub fn times(self, quantity: u32) -> Option<Self> {
        Self::try_from(self.0.checked_mul(Decimal::from(quantity))?).ok()
    }

    /// The sum; `None` where it leaves the range of money.
    #[must_use]
    pub fn plus(self, other: Self) -> Option<Self> {
        Self::try_from(self.0.checked_add(other.0)?).ok()
    }

    #[must_use]
    pub fn is_negative(self) -> bool {
        self.0.is_sign_negative()
    }

    /// As bytes that are the same for `5.1` and `5.10`.
    #[must_use]
    pub fn value_bytes(self) -> [u8; 16] {
        self.0.normalize().serialize()
    }
}

impl TryFrom<Decimal> for Price {
    type Error = MoneyError;

    fn try_from(mut value: Decimal) -> Result<Self, MoneyError> {
        if value.is_zero() {
            value.set_sign_positive(true);
        }
        if value.scale() > MAX_DECIMALS {
            Err(MoneyError::TooPrecise)
        } else if value.abs() >= LIMIT {
            Err(MoneyError::TooLarge)
        } else {
            Ok(Self(value))
        }
    }
}

impl TryFrom<Price> for Money {
    type Error = MoneyError;

    fn try_from(price: Price) -> Result<Self, MoneyError> {
        if price.is_negative() { Err(MoneyError::Negative) } else { Ok(Self(price.0)) }
    }
}

impl TryFrom<Decimal> for Money {
    type Error = MoneyError;

    fn try_from(value: Decimal) -> Result<Self, MoneyError> {
        if value.is_sign_negative() && !value.is_zero() {
            return Err(MoneyError::Negative);
        }
        Price::try_from(value)?.try_into()
    }
}

/// The grammar is JSON's own: no `+1`, `.5`, `1_000`, `NaN` or blanks, which other readers of decimals let
/// through.
pub(crate) fn is_json_number(text: &str) -> bool {
    text.starts_with(|c: char| c == '-' || c.is_ascii_digit())
        && text.ends_with(|c: char| c.is_ascii_digit())
        && serde_json::from_str::<&RawValue>(text).is_ok()
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Money {
    /// A JSON number with these very digits.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Price(self.0).serialize(serializer)
    }
}

impl Serialize for Price {
    /// A JSON number with these very digits.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        RawValue::from_string(self.0.to_string()).map_err(serde::ser::Error::custom)?.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Money {
    /// From a JSON number or a string of one, read from text that is held in memory.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&RawValue>::deserialize(deserializer)?.get();
        let text = raw.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(raw);
        Self::parse(text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn json(text: &str) -> Result<Money, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn digits_come_back_as_they_were_given() {
        for text in ["0", "59.98", "59.980", "0.0001", "99999999999999.9999", "10"] {
            let number = json(text).unwrap();
            assert_eq!(serde_json::to_string(&number).unwrap(), text);
            assert_eq!(json(&format!("\"{text}\"")).unwrap(), number);
        }
        assert_eq!(json("1e2").unwrap().to_string(), "100");
        assert_eq!(json("-0.00").unwrap().to_string(), "0.00");
    }

    #[test]
    fn what_is_no_money_is_named() {
        use MoneyError::*;
        for (text, error) in [
            ("", NotANumber),
            ("NaN", NotANumber),
            ("Infinity", NotANumber),
            ("+1", NotANumber),
            (".5", NotANumber),
            ("5.", NotANumber),
            ("1_000", NotANumber),
            (" 1", NotANumber),
            ("0x10", NotANumber),
            ("01", NotANumber),
            ("-0.01", Negative),
            ("1.00001", TooPrecise),
            ("1e-5", TooPrecise),
            ("1e-400", TooPrecise),
            ("0.00000000000000000000000000000001", TooPrecise),
            ("100000000000000", TooLarge),
            ("1e14", TooLarge),
            ("1e400", TooLarge),
            ("99999999999999999999999999999999999", TooLarge),
        ] {
            assert_eq!(Money::parse(text), Err(error), "{text}");
        }
        assert!(Money::parse(&"9".repeat(10_000_000)).is_err());
    }

    proptest! {
        #[test]
        fn sums_are_exact(cents in proptest::collection::vec((0u32..1_000_000, 1u32..1_000), 0..50)) {
            let total = cents.iter().try_fold(Price::ZERO, |sum, (price, quantity)| {
                Price::try_from(Decimal::new(i64::from(*price), 2)).unwrap().times(*quantity).and_then(|m| sum.plus(m))
            }).unwrap();
            let expected: i128 = cents.iter().map(|(p, q)| i128::from(*p) * i128::from(*q)).sum();
            prop_assert_eq!(Money::try_from(total).unwrap().decimal() * Decimal::from(100), Decimal::from_i128_with_scale(expected, 0));
        }

        #[test]
        fn no_text_panics(text in ".{0,80}") {
            let _ = Money::parse(&text);
        }
    }
}
