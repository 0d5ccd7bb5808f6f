//! The body of `POST /orders`: read, checked against every rule that its own fields can break, and
//! turned into what is to be done. Knows neither HTTP nor the database.

use serde_json::value::RawValue;
use shared::{
    lifecycle::{Lifecycle, Lifecycles, Need},
    money::Money,
    order::{
        self, Amounts, Content, DELETED, Item, MAX_ID, PayloadFields, Source, Violation, money, parse_items, text,
        total, worth,
    },
};
use uuid::Uuid;

use crate::{
    body::Body,
    identity::Caller,
    json::{self, Digest},
};

/// What a client asks for.
#[derive(Debug)]
pub enum Upsert {
    Create(NewOrder),
    Update(Change),
    Delete(Target),
}

#[derive(Debug)]
pub struct NewOrder {
    pub user_id: String,
    pub external_id: Option<String>,
    /// The deleted order that had its external id, by its id.
    pub replaces: Option<Uuid>,
    pub lifecycle: &'static Lifecycle,
    pub fields: Fields,
    /// Of all that the client gave: tells a safe repeat from a conflict.
    pub fingerprint: Digest,
}

/// An order to be changed, as the client names it.
#[derive(Debug)]
pub struct Target {
    pub order_id: Uuid,
    /// If given, the order must be this user's.
    pub user_id: Option<String>,
}

#[derive(Debug)]
pub struct Change {
    pub target: Target,
    /// May be repeated; another one is refused.
    pub external_id: Option<String>,
    /// May be repeated; another one is refused.
    pub lifecycle: Option<&'static Lifecycle>,
    pub fields: Fields,
}

/// The content of an order that a client gave; `None` is what it did not.
#[derive(Debug, Default)]
pub struct Fields {
    /// Normalised: the names and the order of fields are ours.
    pub items: Option<Box<RawValue>>,
    pub amount: Option<Money>,
    pub currency: Option<Currency>,
    pub payload: Option<Box<RawValue>>,
    pub shipping_address: Option<String>,
    pub billing_address: Option<String>,
    pub notes: Option<String>,
}

impl Fields {
    fn content(&self) -> Content<'_> {
        Content {
            items: self.items.as_deref(),
            amount: self.amount,
            currency: self.currency.as_ref().and_then(Currency::code),
            payload: self.payload.as_deref(),
        }
    }

    /// Bytes of all that was given.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let json = [&self.items, &self.payload].into_iter().flatten().map(|raw| raw.get().len());
        let texts = [&self.shipping_address, &self.billing_address, &self.notes].into_iter().flatten();
        json.sum::<usize>() + texts.map(String::len).sum::<usize>()
    }
}

/// The currency that goes with the given content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Currency {
    /// By the order's own field, else by the payload's, else by default.
    Known(String),
    /// The payload's is none; the worker says so.
    Broken,
}

impl Currency {
    /// `None` where it is none.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Known(code) => Some(code),
            Self::Broken => None,
        }
    }
}

/// What an order of this lifecycle cannot do without, and has not.
pub fn lacks(lifecycle: &Lifecycle, user_id: &str, content: &Content<'_>, amounts: Amounts) -> Vec<Violation> {
    let (needs, name) = (&lifecycle.requires, &lifecycle.name);
    let mut violations = Vec::new();
    let user_is_fine = match needs.user_id {
        Need::None | Need::Any => true,
        Need::Whole => order::whole(user_id).is_some(),
    };
    if !user_is_fine {
        violations
            .push(Violation::new("/user_id", format!("must be a whole number, such as 7, in the lifecycle {name}")));
    }
    if needs.amount != Need::None {
        match worth(content, amounts).map(|worth| worth.amount) {
            // Of what only the payload holds, too: money or goods are asked for at once.
            Err(reasons) => violations.extend(reasons),
            Ok(None) => {
                let reason = format!("is missing: the lifecycle {name} needs items or an amount");
                violations.push(Violation::new("/amount", reason));
            }
            Ok(Some(amount)) if needs.amount == Need::Whole && !amount.is_whole_and_positive() => {
                let reason = format!("must be a whole number and more than 0 in the lifecycle {name}, and is {amount}");
                violations.push(Violation::new("/amount", reason));
            }
            Ok(Some(_)) => {}
        }
    }
    violations
}

/// Why a body is not taken.
#[derive(Debug)]
pub enum BadRequest {
    /// It is no JSON.
    Malformed(String),
    /// It breaks these rules.
    Invalid(Vec<Violation>),
}

/// What applies where the body is silent.
#[derive(Clone, Debug)]
pub struct Defaults {
    pub lifecycles: &'static Lifecycles,
    pub lifecycle: &'static Lifecycle,
    pub currency: String,
}

/// Can this be about an order that exists? Told without parsing: a new order passes for one, too, when its
/// payload has such a key, or when there is a backslash, with which the key could be written otherwise.
pub(crate) fn may_name_an_order(body: &[u8]) -> bool {
    const KEY: &[u8] = br#""order_id""#;
    body.contains(&b'\\') || body.windows(KEY.len()).any(|part| part == KEY)
}

/// Reads a body that this caller sent.
pub(crate) fn parse(body: &[u8], caller: &Caller, defaults: &Defaults) -> Result<Upsert, BadRequest> {
    parse_with_items(body, None, caller, defaults)
}

/// As [`parse`]; the items are these, which have the prices that the body's lack.
pub(crate) fn parse_with_items(
    body: &[u8],
    items: Option<&RawValue>,
    caller: &Caller,
    defaults: &Defaults,
) -> Result<Upsert, BadRequest> {
    let body =
        std::str::from_utf8(body).map_err(|error| BadRequest::Malformed(format!("the body is not UTF-8: {error}")))?;
    if body.trim().is_empty() {
        return Err(BadRequest::Malformed("there is no body: send the order as a JSON object".to_owned()));
    }
    let raw: Body<'_> = serde_json::from_str(body).map_err(|error| {
        if error.is_data() {
            BadRequest::Invalid(vec![Violation::new("", "must be a JSON object")])
        } else {
            BadRequest::Malformed(format!("the body is not JSON: {}", place(&error)))
        }
    })?;
    let mut check = Check { violations: raw.violations(), malformed: None };
    let upsert = check.upsert(&raw, items, caller, defaults);
    if let Some(reason) = check.malformed {
        return Err(BadRequest::Malformed(reason));
    }
    match upsert {
        Some(upsert) if check.violations.is_empty() => Ok(upsert),
        _ if check.violations.is_empty() => Err(BadRequest::Malformed("the body makes no sense".to_owned())),
        _ => Err(BadRequest::Invalid(check.violations)),
    }
}

/// What is wrong with a JSON text, and where. A line of many orders is one line to its parser, whatever its own number.
fn place(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ")
}

/// The items of a body.
struct Items {
    json: Box<RawValue>,
    /// `None` where it leaves the range of money.
    total: Option<Money>,
    digest: Digest,
}

/// Of what they say: 5.1 is as good as 5.10.
fn digest_of(items: &[Item<'_>]) -> Digest {
    let mut bytes = Vec::with_capacity(items.len() * 48);
    for item in items {
        bytes.extend((item.product_id.len() as u64).to_le_bytes());
        bytes.extend(item.product_id.as_bytes());
        bytes.extend(item.quantity.to_le_bytes());
        bytes.extend(item.unit_price.value_bytes());
    }
    Digest::of_bytes(&bytes)
}

/// What an order's own fields come to, and which says so, where the currency is known too.
fn own_amount<'a>(
    items: Option<&Items>,
    amount: Option<Money>,
    currency: Option<&'a str>,
) -> Option<(&'static str, Money, &'a str)> {
    let (field, amount) = match (items, amount) {
        (Some(items), _) => ("items", items.total?),
        (None, amount) => ("amount", amount?),
    };
    Some((field, amount, currency?))
}

/// Collects every broken rule, not just the first.
struct Check {
    violations: Vec<Violation>,
    /// An id that is none counts before any broken rule.
    malformed: Option<String>,
}

impl Check {
    fn broken(&mut self, name: &str, reason: impl Into<String>) {
        self.violations.push(Violation::new(format!("/{name}"), reason));
    }

    fn upsert(
        &mut self,
        body: &Body<'_>,
        priced: Option<&RawValue>,
        caller: &Caller,
        defaults: &Defaults,
    ) -> Option<Upsert> {
        let order_id = self.order_id(body);
        let user_id = self.user_id(body, caller, order_id.is_none());
        let external_id = self.id(body, "external_id").filter(|id| !id.is_empty());
        let lifecycle = self.lifecycle(body, defaults.lifecycles);
        let deleting = self.status(body);
        let replaces = self.replaces(body, order_id.is_none());
        let payload = self.payload(body);
        let from_payload = payload.as_ref().and_then(|(raw, _)| match PayloadFields::of(raw) {
            Ok(fields) => Some(fields),
            Err(violation) => {
                self.violations.push(violation);
                None
            }
        });
        let items = self.items(priced.or(body.get("items")));
        // A repeat is the same order even where prices have changed meanwhile.
        let items_digest = match (priced, body.get("items")) {
            (Some(_), Some(given)) => json::digest(given).ok(),
            _ => items.as_ref().map(|items| items.digest),
        };
        let amount = self.amount(body, items.as_ref().and_then(|items| items.total));
        let own_currency = self.currency(body);
        let mut texts = ["shipping_address", "billing_address", "notes"].map(|name| self.text(body, name));

        let fingerprint = |lifecycle: &Lifecycle, texts: &[Option<String>; 3]| {
            let of_text = |text: Option<&str>| text.map(Digest::of_text);
            Digest::of_fields(&[
                ("lifecycle", of_text(Some(&lifecycle.name))),
                ("items", items_digest),
                ("amount", amount.map(|amount| Digest::of_bytes(&amount.value_bytes()))),
                ("currency", of_text(own_currency.as_deref())),
                ("payload", payload.as_ref().map(|(_, digest)| *digest)),
                ("shipping_address", of_text(texts[0].as_deref())),
                ("billing_address", of_text(texts[1].as_deref())),
                ("notes", of_text(texts[2].as_deref())),
                // Who says so wants another order, be it the same again.
                ("replaces", replaces.map(|order_id| Digest::of_bytes(order_id.as_bytes()))),
            ])
        };
        let fingerprint = fingerprint(lifecycle.unwrap_or(defaults.lifecycle), &texts);
        let creating = order_id.is_none();
        let of_payload = from_payload.and_then(|fields| fields.id).filter(|_| creating && external_id.is_none());
        let external_id = external_id.or_else(|| self.payload_id(of_payload?));
        let names_currency = own_currency.is_some() || from_payload.is_some_and(|fields| fields.currency.is_some());
        let currency = match (own_currency, from_payload.and_then(|fields| fields.currency)) {
            (Some(own), _) => Some(Currency::Known(own)),
            (None, Some(raw)) if raw.get() != "null" => {
                let known = text(raw).filter(|code| order::currency(code).is_ok());
                Some(known.map_or(Currency::Broken, |code| Currency::Known(code.into_owned())))
            }
            // A given payload brings its own currency; without one it is the default again.
            _ if creating || payload.is_some() => Some(Currency::Known(defaults.currency.clone())),
            _ => None,
        };
        let code = currency.as_ref().and_then(Currency::code);
        if let Some((field, amount, code)) = own_amount(items.as_ref(), amount, code)
            && let Err(mut reason) = defaults.lifecycles.amounts.check(amount, code)
        {
            if !names_currency {
                reason.push_str("; give a currency if it is another");
            }
            self.broken(field, reason);
        }
        let fields = Fields {
            items: items.map(|items| items.json),
            amount,
            currency,
            payload: payload.map(|(raw, _)| raw),
            shipping_address: texts[0].take(),
            billing_address: texts[1].take(),
            notes: texts[2].take(),
        };
        match (order_id, deleting) {
            (None, true) => {
                self.broken("order_id", "is missing: which order is to be deleted?");
                None
            }
            (None, false) => {
                if user_id.is_none() && !self.violations.iter().any(|v| v.pointer == "/user_id") {
                    self.broken("user_id", "is missing: give it here or in the header X-User-Id");
                }
                let lifecycle = lifecycle.unwrap_or(defaults.lifecycle);
                if self.violations.is_empty() {
                    let user_id = user_id.as_deref().unwrap_or_default();
                    self.violations.extend(lacks(lifecycle, user_id, &fields.content(), defaults.lifecycles.amounts));
                }
                if replaces.is_some() && external_id.is_none() {
                    self.broken("replaces", "is for an order with the same external_id: give that");
                }
                let user_id = user_id?;
                Some(Upsert::Create(NewOrder { user_id, external_id, replaces, lifecycle, fields, fingerprint }))
            }
            (Some(order_id), true) => Some(Upsert::Delete(Target { order_id, user_id })),
            (Some(order_id), false) => {
                Some(Upsert::Update(Change { target: Target { order_id, user_id }, external_id, lifecycle, fields }))
            }
        }
    }

    /// `None` creates.
    fn order_id(&mut self, body: &Body<'_>) -> Option<Uuid> {
        let raw = body.get("order_id")?;
        match text(raw).as_deref() {
            Some("" | "0") => None,
            Some(id) => {
                let parsed = Uuid::try_parse(id).ok();
                if parsed.is_none() {
                    self.malformed =
                        Some("order_id is not a UUID; leave it out, or give \"0\", to create an order".to_owned());
                }
                parsed
            }
            None => {
                self.broken("order_id", "must be text");
                None
            }
        }
    }

    fn replaces(&mut self, body: &Body<'_>, creating: bool) -> Option<Uuid> {
        let order_id = text(body.get("replaces")?).and_then(|id| Uuid::try_parse(&id).ok());
        match order_id {
            Some(_) if !creating => self.broken("replaces", "is for new orders, which have no order_id"),
            Some(order_id) => return Some(order_id),
            None => self.broken("replaces", "must be the order_id of a deleted order"),
        }
        None
    }

    /// Whose order it is or has to be: the caller's own, or the one that the body names. `None` with
    /// an update: whoever's.
    fn user_id(&mut self, body: &Body<'_>, caller: &Caller, creating: bool) -> Option<String> {
        let own = self.id(body, "user_id");
        if own.as_deref() == Some("") {
            self.broken("user_id", "must have 1 to 255 characters");
        }
        let implied = if creating { caller.user() } else { caller.only() };
        match (own, implied) {
            (Some(own), _) if !caller.sees(&own) => {
                self.broken("user_id", "is another than the caller's (X-User-Id, or the token's sub)");
                None
            }
            (Some(own), _) => Some(own),
            (None, Some(user)) => {
                if user.is_empty() || user.chars().count() > MAX_ID {
                    self.broken("user_id", "the header X-User-Id must have 1 to 255 characters");
                }
                Some(user.to_owned())
            }
            (None, None) => None,
        }
    }

    /// An id from elsewhere: text, or a whole number.
    fn id(&mut self, body: &Body<'_>, name: &str) -> Option<String> {
        let raw = body.get(name)?;
        match order::id(raw) {
            Some(id) => self.checked_id(name, id.into_owned()),
            None => {
                self.broken(name, "must be text or a whole number");
                None
            }
        }
    }

    fn checked_id(&mut self, name: &str, id: String) -> Option<String> {
        if id.chars().count() > MAX_ID {
            self.broken(name, "must have 1 to 255 characters");
        } else if id.contains('\0') {
            self.broken(name, "must not contain \\u0000");
        } else {
            return Some(id);
        }
        None
    }

    /// The marketplace's own id in its payload, if it looks like one.
    fn payload_id(&mut self, raw: &RawValue) -> Option<String> {
        // Nobody knows here what a number means: each spelling of it is another id.
        let is_number = raw.get().starts_with(|first: char| first == '-' || first.is_ascii_digit());
        let id = if is_number { Some(raw.get().into()) } else { text(raw) };
        self.checked_id("payload/id", id.filter(|id| !id.is_empty())?.into_owned())
    }

    fn lifecycle(&mut self, body: &Body<'_>, known: &'static Lifecycles) -> Option<&'static Lifecycle> {
        let raw = body.get("lifecycle")?;
        let found = text(raw).and_then(|name| known.find(&name));
        if found.is_none() {
            self.broken("lifecycle", format!("must be one of {}", known.names()));
        }
        found
    }

    /// Is the order to be deleted?
    fn status(&mut self, body: &Body<'_>) -> bool {
        match body.get("status").map(text) {
            None => false,
            Some(Some(status)) if status == DELETED => true,
            Some(_) => {
                self.broken("status", "can only be \"deleted\" here; other states have routes of their own");
                false
            }
        }
    }

    fn payload(&mut self, body: &Body<'_>) -> Option<(Box<RawValue>, Digest)> {
        let raw = body.get("payload")?;
        let raw = match text(raw) {
            // payload_json: JSON in a string.
            Some(json) => RawValue::from_string(json.strip_prefix('\u{feff}').unwrap_or(&json).to_owned())
                .map_err(|error| {
                    self.broken("payload", format!("as a text (payload_json) must be JSON: {}", place(&error)))
                })
                .ok()?,
            None => raw.to_owned(),
        };
        if !raw.get().starts_with('{') {
            self.broken("payload", "must be an object");
            return None;
        }
        match json::digest(&raw) {
            Ok(digest) => Some((raw, digest)),
            Err(error) => {
                self.broken(&format!("payload{}", error.pointer), error.reason);
                None
            }
        }
    }

    fn items(&mut self, raw: Option<&RawValue>) -> Option<Items> {
        match parse_items(raw?, "/items", Source::Own) {
            Ok(items) => Some(Items {
                json: serde_json::value::to_raw_value(&items).ok()?,
                total: total(&items),
                digest: digest_of(&items),
            }),
            Err(violations) => {
                self.violations.extend(violations);
                None
            }
        }
    }

    fn amount(&mut self, body: &Body<'_>, items_total: Option<Money>) -> Option<Money> {
        let amount = money(body.get("amount")?).map_err(|error| self.broken("amount", error.to_string())).ok()?;
        match items_total {
            Some(total) if total != amount => {
                self.broken("amount", format!("is not what the items come to, {total}; leave it out"));
                None
            }
            _ => Some(amount),
        }
    }

    fn currency(&mut self, body: &Body<'_>) -> Option<String> {
        let code = text(body.get("currency")?).unwrap_or_default();
        match order::currency(&code) {
            Ok(code) => Some(code.to_owned()),
            Err(reason) => {
                self.broken("currency", reason);
                None
            }
        }
    }

    fn text(&mut self, body: &Body<'_>, name: &str) -> Option<String> {
        match text(body.get(name)?) {
            Some(text) if text.contains('\0') => self.broken(name, "must not contain \\u0000"),
            Some(text) => return Some(text.into_owned()),
            None => self.broken(name, "must be text"),
        }
        None
    }
}

#[cfg(test)]
mod tests;
