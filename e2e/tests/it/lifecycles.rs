//! Lifecycles that somebody else wrote: one file in `LIFECYCLES_DIR`, no line of Rust.

use std::path::PathBuf;

use serde_json::{Value, json};
use test_support::{Api, Method, Record, Settings, System, Worker, beside_others, eventually, refused_at_start};
use uuid::Uuid;

/// A folder with one lifecycle in it; gone with this.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn with(file: &str, text: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("lifecycles-{}", Uuid::now_v7().simple()));
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(file), text).expect("a file");
        Self(folder)
    }

    pub(crate) fn path(&self) -> String {
        self.0.display().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A library's loans: six states, two topics, a timeout, and a message on every change.
const LOAN: &str = r#"
name = "loan"
initial = "asked"

[states]
asked = { code = 10 }
reserved = { code = 20 }
lent = { code = 30 }
overdue = { code = 40 }
back = { code = 50, terminal = true }
refused = { code = 60, terminal = true, cancel = true }

[content]
change_in = ["asked"]
on_handled = "checked"

[[transitions]]
from = ["asked"]
to = "reserved"
on = ["checked"]

[[transitions]]
from = ["reserved"]
to = "lent"
on = ["handed out"]

[[transitions]]
from = ["reserved"]
to = "refused"
on = ["not found"]
by_hand = true

[[transitions]]
from = ["lent"]
to = "overdue"
on = ["term over"]

[[transitions]]
from = ["lent", "overdue"]
to = "back"
on = ["returned"]
by_hand = true

[[timeouts]]
in = "lent"
after = "${LOAN_TERM:-30days}"
trigger = "term over"

[[receives]]
topic = "${DESK_TOPIC:-desk}"
order_id = "/loan/id"
message_id = "/slip"
trigger = "/loan/what"
triggers = { out = "handed out", missing = "not found" }
reason = "/loan/note"

[[receives]]
topic = "${SHELF_TOPIC:-shelf}"
order_id = "/id"
trigger = "/returned"
triggers = { true = "returned" }

[[emits]]
on_change = true
topic = "${READERS_TOPIC:-readers}"
key = "{user_id}"
body = { reader = "{user_id}", from = "{from_code}", to = "{to_code}", books = [{ title = "{item.product_id}", copies = "{item.quantity}" }], fixed = ["library", 7, true] }
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_lifecycle_of_ones_own_is_one_file() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let folder = Folder::with("loan.toml", LOAN);
    let topic = |name: &str| format!("{}.{name}", system.events());
    let mut settings: Settings = system.settings();
    for (key, value) in [
        ("LIFECYCLES_DIR", folder.path()),
        ("LOAN_TERM", "1s".to_owned()),
        ("SCHEDULER_INTERVAL", "100ms".to_owned()),
        ("DESK_TOPIC", topic("desk")),
        ("SHELF_TOPIC", topic("shelf")),
        ("READERS_TOPIC", topic("readers")),
    ] {
        settings.set(key, value);
    }
    let (api, _worker) = (Api::start(&settings).await, Worker::start(&settings).await);
    let asked = json!({
        "user_id": "reader", "lifecycle": "loan",
        "items": [{ "product_id": "Rayuela", "quantity": 1, "unit_price": 0 }],
    });
    let loan = api.http().post_order(&asked).await.expect_status(201);
    assert_eq!(loan.text("order_status"), "reserved");
    let order_id = loan.text("order_id");
    let becomes = async |status: &str| {
        eventually(&format!("the loan to be {status}"), || async {
            let order = api.http().get_order(&order_id).await;
            if order["status"] == status { Ok(()) } else { Err(order.to_string()) }
        })
        .await;
    };
    let desk = json!({ "slip": 1, "loan": { "id": order_id, "what": "out" } });
    system.kafka.produce(&topic("desk"), Record::new("", desk.to_string())).await;
    becomes("lent").await;
    becomes("overdue").await; // by the clock
    let shelf = json!({ "id": order_id, "returned": true });
    system.kafka.produce(&topic("shelf"), Record::new("", shelf.to_string())).await;
    becomes("back").await;

    let told = eventually("four messages to the reader", || async {
        let told = system.kafka.read(&topic("readers")).await;
        if told.len() == 4 { Ok(told) } else { Err(format!("{} messages", told.len())) }
    })
    .await;
    assert!(told.iter().all(|message| message.key_text() == "reader"));
    let moves: Vec<Value> = told.iter().map(|message| message.json()["to"].clone()).collect();
    assert_eq!(json!(moves), json!([20, 30, 40, 50]));
    let first = told.iter().map(|message| message.json()).find(|body| body["to"] == 20).expect("the first");
    let expected = json!({
        "reader": "reader", "from": 10, "to": 20,
        "books": [{ "title": "Rayuela", "copies": 1 }], "fixed": ["library", 7, true],
    });
    assert_eq!(first, expected);
    let history = api.http().history(&order_id).await;
    let events: Vec<_> = history.iter().map(|row| row["event"].as_str().unwrap_or_default()).collect();
    assert_eq!(events, ["order.created", "handled", "handed out", "term over", "returned"]);
    // By hand, too, and refused where it cannot be.
    let path = format!("/orders/{order_id}/cancel");
    let refused = api.http().send(Method::POST, &path, &[], Default::default()).await.expect("an answer");
    assert_eq!(refused.expect_status(409).json()["allowed"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_same_name_takes_the_place_of_one_of_the_release() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let marketplace = include_str!("../../../lifecycles/marketplace.toml");
    let told = system.events().to_owned() + ".told";
    let emits = format!(
        "{marketplace}\n[[emits]]\non_change = true\ntopic = \"{told}\"\nbody = {{ id = \"{{order_id}}\", now = \"{{to}}\" }}\n"
    );
    let folder = Folder::with("mine.toml", &emits);
    let changes = [("LIFECYCLES_DIR", folder.path())];
    let changes: Vec<_> = changes.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let (api, _worker) = (system.api_with(&changes).await, system.worker_with(&changes).await);
    let order_id = api.http().post_order(&test_support::order("user")).await.expect_status(201).text("order_id");
    eventually("the message", || async {
        let bodies: Vec<Value> = system.kafka.read(&told).await.iter().map(|message| message.json()).collect();
        if bodies == [json!({ "id": order_id, "now": "done" })] { Ok(()) } else { Err(format!("{bodies:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_external_id_of_an_order_that_a_message_made_is_taken() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let topic = format!("{}.update", system.events());
    let settings = system.settings().with(&[("ORDER_STATE_UPDATE_TOPIC", &topic)]);
    let (api, _worker) = (Api::start(&settings).await, Worker::start(&settings).await);
    let paid = json!({ "eventType": "PaymentCompleted", "orderId": 12 });
    system.kafka.produce(&topic, Record::new("", paid.to_string())).await;
    eventually("the order to be there", || async {
        let reply = api.http().get("/orders/by-external/12?user_id=unknown").await;
        if reply.status == 200 { Ok(()) } else { Err(reply.summary()) }
    })
    .await;
    let same = json!({ "user_id": "unknown", "external_id": "12", "lifecycle": "shipment" });
    let refused = api.http().post_order(&same).await.expect_status(409);
    assert_eq!(refused.problem(), "conflict");
    // Messages do not bring back what was deleted: neither this one again nor another.
    let order_id = refused.text("order_id");
    api.http().post_order(&json!({ "order_id": order_id, "status": "deleted" })).await.expect_status(200);
    let again = json!({ "eventType": "PaymentCompleted", "orderId": 12, "timestamp": "2026-01-02T03:04:05Z" });
    for message in [&paid, &again] {
        system.kafka.produce(&topic, Record::new("", message.to_string())).await;
    }
    eventually("both to be read", || async {
        match system.kafka.lag(&topic).await {
            0 => Ok(()),
            lag => Err(format!("{lag} behind")),
        }
    })
    .await;
    assert_eq!(api.http().get_order(&order_id).await["status"], "deleted");
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 1);
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_is_refused_at_start_by_name_key_and_remedy() {
    let _turn = beside_others().await;
    let wrong = |from: &str, to: &str| {
        assert!(LOAN.contains(from), "{from}");
        LOAN.replacen(from, to, 1)
    };
    for (text, key, remedy) in [
        (wrong("name = \"loan\"", "name = loan"), "line 2", "correct it"),
        (wrong("initial = \"asked\"", "initial = \"wished\""), "initial", "declare it under [states]"),
        (wrong("initial = \"asked\"", "initial = \"asked\"\ncolour = \"red\""), "line", "correct it"),
        (wrong("to = \"lent\"", "to = \"lend\""), "transitions[1].to", "declare it under [states]"),
        (wrong("from = [\"lent\"]", "from = [\"back\"]"), "transitions[3].from", "take back out"),
        (wrong("back = { code = 50, terminal = true }", "back = {}"), "states.back", "terminal = true"),
        (wrong("code = 60", "code = 50"), "states.refused.code", "give each state its own"),
        (wrong("[states]", "[states]\nlost = { terminal = true }"), "states.lost", "add a transition to it"),
        (wrong("on = [\"handed out\"]", "on = [\"handed\"]"), "transitions[1].on", "name it in receives.triggers"),
        (wrong("after = \"${LOAN_TERM:-30days}\"", "after = \"a month\""), "timeouts[0].after", "write 30s"),
        (wrong("in = \"lent\"", "in = \"asked\""), "timeouts[0].trigger", "add a transition"),
        (wrong("order_id = \"/id\"", "order_id = \"id\""), "receives[1].order_id", "begin with a slash"),
        (wrong("${SHELF_TOPIC:-shelf}", "payment-results"), "receives", "let each topic be received once"),
        (wrong("${READERS_TOPIC:-readers}", "orders.events"), "emits[0].topic", "send to a topic that no"),
        (wrong("{item.quantity}", "{item.weight}"), "emits[0].body.books", "use one of those"),
        (wrong("${DESK_TOPIC:-desk}", "${DESK_TOPIC}"), "receives[0].topic", "set it, or give a default"),
        (wrong("[content]", "[contents]"), "line", "correct it"),
    ] {
        let folder = Folder::with("loan.toml", &text);
        for binary in ["api-service", "worker"] {
            let settings = Settings::default().with(&[("LIFECYCLES_DIR", &folder.path())]);
            let said = refused_at_start(binary, &settings).await;
            // Of two files that clash, the second is named, whichever that is.
            let named = said.contains("loan.toml: ") || said.contains("lifecycles/payment.toml: ");
            assert!(named && said.contains(key) && said.contains(remedy), "{binary}, {key}, said: {said}");
        }
    }
}
