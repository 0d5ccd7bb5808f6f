//! Orders and what happened to them, as text for people. Others wrote what stands in them: a
//! terminal must not obey it.

use serde::Deserialize;
use serde_json::value::RawValue;

/// An order as the service tells it, as far as it is shown. Amounts keep their digits.
#[derive(Debug, Deserialize)]
pub struct Order {
    pub order_id: String,
    pub user_id: String,
    pub external_id: Option<String>,
    pub lifecycle: String,
    pub status: String,
    pub version: i64,
    pub amount: Option<Box<RawValue>>,
    pub currency: Option<String>,
    #[serde(default)]
    pub items: Option<Vec<Item>>,
    pub payload: Option<Box<RawValue>>,
    pub shipping_address: Option<String>,
    pub billing_address: Option<String>,
    pub notes: Option<String>,
    pub created_at: String,
    pub updated_at: String,
}

/// As it was given: a payload's ids and quantities may be numbers or texts, and of a cancelled line there may be no more
/// than the quantity.
#[derive(Debug, Deserialize)]
pub struct Item {
    pub product_id: Option<Box<RawValue>>,
    pub quantity: Box<RawValue>,
    #[serde(alias = "price")]
    pub unit_price: Option<Box<RawValue>>,
}

/// A line of an order's history, and an event of those who watch it.
#[derive(Debug, Deserialize)]
pub struct Happened {
    pub version: i64,
    pub from: Option<String>,
    pub to: String,
    pub event: String,
    pub cause: String,
    pub ignored: bool,
    pub at: String,
}

/// What became of a request.
#[derive(Debug, Deserialize)]
pub struct Done {
    pub order_id: String,
    pub status: String,
    pub order_status: Option<String>,
    pub order_version: Option<i64>,
    pub amount: Option<Box<RawValue>>,
    pub currency: Option<String>,
}

fn money(amount: Option<&RawValue>, currency: Option<&str>) -> String {
    match amount {
        Some(amount) => format!("{} {}", amount.get(), currency.unwrap_or_default()).trim_end().to_owned(),
        None => "-".to_owned(),
    }
}

/// What became of a request, in one line.
#[must_use]
pub fn done(done: &Done) -> String {
    let state = match (&done.order_status, done.order_version) {
        (Some(status), Some(version)) => format!("{status} at version {version}"),
        _ => "stored".to_owned(),
    };
    let amount = money(done.amount.as_deref(), done.currency.as_deref());
    printable(&format!("{} {}: {state}, {amount}", done.order_id, done.status))
}

/// All of an order, a field a line.
#[must_use]
pub fn order(order: &Order) -> String {
    let version = order.version.to_string();
    let amount = money(order.amount.as_deref(), order.currency.as_deref());
    let mut lines = Vec::new();
    for (name, value) in [
        ("order", Some(order.order_id.as_str())),
        ("user", Some(&order.user_id)),
        ("external id", order.external_id.as_deref()),
        ("lifecycle", Some(&order.lifecycle)),
        ("status", Some(&order.status)),
        ("version", Some(&version)),
        ("amount", Some(&amount)),
        ("shipping", order.shipping_address.as_deref()),
        ("billing", order.billing_address.as_deref()),
        ("notes", order.notes.as_deref()),
        ("payload", order.payload.as_deref().map(RawValue::get)),
        ("created", Some(&order.created_at)),
        ("updated", Some(&order.updated_at)),
    ] {
        if let Some(value) = value {
            lines.push(format!("{name:<12} {}", printable(value)));
        }
    }
    for item in order.items.iter().flatten() {
        let text =
            |raw: &RawValue| printable(&serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned()));
        let [id, price] = [&item.product_id, &item.unit_price].map(|raw| raw.as_deref().map_or("-".to_owned(), text));
        lines.push(format!("{:<12} {} × {id} at {price}", "item", text(&item.quantity)));
    }
    lines.join("\n")
}

/// Orders, one a line.
#[must_use]
pub fn orders(orders: &[Order]) -> String {
    let head = ["ORDER", "USER", "EXTERNAL ID", "LIFECYCLE", "STATUS", "AMOUNT", "CREATED"];
    let rows = orders.iter().map(|order| {
        let external = order.external_id.clone().unwrap_or_else(|| "-".to_owned());
        let amount = money(order.amount.as_deref(), order.currency.as_deref());
        [&order.order_id, &order.user_id, &external, &order.lifecycle, &order.status, &amount, &order.created_at]
            .map(|cell| printable(cell))
    });
    columns(head, rows)
}

/// A history, one version a line.
#[must_use]
pub fn history(history: &[Happened]) -> String {
    let head = ["VERSION", "AT", "EVENT", "FROM", "TO", "CAUSE"];
    let rows = history.iter().map(|row| {
        let event = if row.ignored { format!("{} (ignored)", row.event) } else { row.event.clone() };
        let from = row.from.clone().unwrap_or_else(|| "-".to_owned());
        [&row.version.to_string(), &row.at, &event, &from, &row.to, &row.cause].map(|cell| printable(cell))
    });
    columns(head, rows)
}

/// What happened just now, in one line.
#[must_use]
pub fn happened(row: &Happened) -> String {
    let way = match row.from.as_deref() {
        Some(from) if from != row.to => format!("{from} → {}", row.to),
        _ => row.to.clone(),
    };
    let ignored = if row.ignored { " (ignored)" } else { "" };
    printable(&format!("{}  version {:<3} {:<24} {way}{ignored}", row.at, row.version, row.event))
}

/// Cells that line up; wide ones are nobody's to cut.
fn columns<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(str::to_owned)).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// Without what a terminal would take for a command.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { plain.extend(c.escape_default()) } else { plain.push(c) }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_keeps_its_digits_and_commands_to_a_terminal_are_shown_as_text() {
        let json = r#"{"order_id":"o","id":"o","user_id":"u\u001b[2J","external_id":null,"lifecycle":"marketplace",
            "status":"done","amount":59.90,"currency":"USD","items":[{"product_id":"p","quantity":2,"unit_price":29.950}],
            "payload":null,"shipping_address":null,"billing_address":null,"notes":null,"version":2,"content_version":1,
            "bucket":0,"created_at":"2026-01-01T00:00:00Z","updated_at":"2026-01-01T00:00:01Z"}"#;
        let read: Order = serde_json::from_str(json).expect("an order");
        let shown = order(&read);
        for part in ["59.90 USD", "2 × p at 29.950", r"u\u{1b}[2J", "version      2"] {
            assert!(shown.contains(part), "{part} in\n{shown}");
        }
        let mut of_payload: Order = serde_json::from_str(json).expect("an order");
        let items = r#"[{"product_id":7,"quantity":"2","price":-1.5},{"product_id":"x","quantity":0}]"#;
        of_payload.items = serde_json::from_str(items).expect("items");
        let shown = order(&of_payload);
        assert!(shown.contains("2 × 7 at -1.5") && shown.contains("0 × x at -"), "{shown}");
        let listed = orders(&[read]);
        assert!(listed.starts_with("ORDER  USER") && listed.lines().count() == 2, "{listed}");
    }
}
