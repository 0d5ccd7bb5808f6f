//! The documents of the API and of the topics are what the service really says.

use boon::{Compiler, Draft, Schemas};
use serde_json::{Value, json};
use test_support::{Message, Method, Reply, System, beside_others, eventually, order};

/// A document, and the schemas in it.
pub(crate) struct Document(pub(crate) Value);

impl Document {
    /// Does `value` follow the schema that stands at `pointer`?
    fn check(&self, pointer: &str, value: &Value) {
        const NAME: &str = "http://document";
        let (mut compiler, mut schemas) = (Compiler::new(), Schemas::new());
        compiler.set_default_draft(Draft::V2020_12);
        compiler.add_resource(NAME, self.0.clone()).expect("a document");
        // A reference is a URI, which has no braces.
        let reference = pointer.replace('{', "%7B").replace('}', "%7D");
        let schema = compiler.compile(&format!("{NAME}#{reference}"), &mut schemas);
        let schema = schema.unwrap_or_else(|error| panic!("{pointer}: {error:#}"));
        if let Err(error) = schemas.validate(value, schema) {
            panic!("{pointer} and {value}: {error:#}");
        }
    }

    /// Is this answer to `method` on `path` (a template) a documented one, in status, type and body?
    pub(crate) fn check_reply(&self, method: &str, path: &str, reply: &Reply) {
        let escape = |text: &str| text.replace('~', "~0").replace('/', "~1");
        let at = format!("/paths/{}/{method}/responses/{}", escape(path), reply.status);
        let told = || format!("{method} {path}: {}", reply.summary());
        let response = self.0.pointer(&at).unwrap_or_else(|| panic!("not documented: {}", told()));
        let Some(content) = response["content"].as_object() else {
            assert!(reply.body.is_empty(), "a body that is not documented: {}", told());
            return;
        };
        let kind = reply.header("content-type").unwrap_or_default();
        let essence = kind.split(';').next().unwrap_or_default();
        assert!(content.contains_key(essence), "{essence} is not documented: {}", told());
        if essence.ends_with("json") && essence != "application/x-ndjson" {
            self.check(&format!("{at}/content/{}/schema", escape(essence)), &reply.json());
        }
        for name in response["headers"].as_object().into_iter().flat_map(|headers| headers.keys()) {
            assert!(reply.header(&name.to_lowercase()).is_some(), "{name} is missing: {}", told());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_to_the_api_is_as_its_document_says() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let document = Document(api.http().get("/openapi.json").await.expect_status(200).json());
    assert!(document.0["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{}", document.0);
    let mut sent = order("alice");
    sent["external_id"] = json!("market-1");
    document.check("/components/schemas/OrderRequest", &sent);
    let id = api.http().post_order_async(&sent).await.expect_status(201).text("order_id");
    for quantity in [json!(2), json!(2.0), json!("2"), json!("2.0"), json!(1_000_000)] {
        let items = json!([{"product_id": "p", "quantity": quantity, "unit_price": "1.10"}]);
        let body = json!({"user_id": "alice", "items": items});
        document.check("/components/schemas/OrderRequest", &body);
        api.http().post_order_async(&body).await.expect_status(201);
    }
    for change in [json!({"order_id": id, "notes": "n"}), json!({"order_id": id, "status": "deleted"})] {
        document.check("/components/schemas/OrderRequest", &change);
        api.http().post_order_async(&change).await.expect_status(200);
    }
    let retail = json!({"user_id": "bob", "order_items": [{"product_id": "p", "quantity": 2, "unit_price": "1.10"}]});
    document.check("/components/schemas/RetailOrderRequest", &retail);
    let headers = [("content-type", "application/json"), ("prefer", "respond-async")];
    let shop = api.http().send(Method::POST, "/api/orders", &headers, retail.to_string().into()).await;
    shop.expect("an answer").expect_status(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_of_the_document_need_nobody_else() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let http = api.http();
    let moved = http.get("/docs").await.expect_status(308);
    assert_eq!(moved.header("location"), Some("docs/"));
    let page = http.get("/docs/").await.expect_status(200);
    assert!(page.header("content-type").is_some_and(|kind| kind.starts_with("text/html")), "{}", page.summary());
    let html = String::from_utf8_lossy(&page.body).into_owned();
    let links = html.split(['"', '\'']).filter(|text| text.ends_with(".js") || text.ends_with(".css"));
    let links: Vec<&str> = links.collect();
    assert!(links.len() >= 3, "{html}");
    for link in links {
        assert!(!link.contains("//"), "{link} is elsewhere");
        http.get(&format!("/docs/{}", link.trim_start_matches("./"))).await.expect_status(200);
    }
    let start = http.get("/docs/swagger-initializer.js").await.expect_status(200);
    assert!(String::from_utf8_lossy(&start.body).contains("../openapi.json"), "{}", start.summary());
    http.get("/docs/nothing").await.expect_status(404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_the_topics_is_as_their_document_says() {
    let _turn = beside_others().await;
    let document = Document(serde_saphyr::from_str(include_str!("../../../docs/asyncapi.yaml")).expect("YAML"));
    for message in ["event", "ack"] {
        for example in document.0["components"]["messages"][message]["examples"].as_array().expect("examples") {
            document.check(&format!("/components/schemas/{message}"), &example["payload"]);
        }
    }
    let system = System::new().await;
    let (api, _worker) = (system.api().await, system.worker().await);
    let http = api.http();
    let id = http.post_order(&order("user")).await.expect_status(201).text("order_id");
    let broken = json!({"user_id": "user", "payload": {"items": "broken"}});
    http.post_order(&broken).await.expect_status(422);
    for body in [json!({"order_id": id, "notes": "n"}), json!({"order_id": id, "status": "deleted"})] {
        http.post_order(&body).await.expect_status(200);
    }
    let acks = eventually("four answers", || async {
        let acks = system.kafka.read(system.acks()).await;
        if acks.len() >= 4 { Ok(acks) } else { Err(format!("{} so far", acks.len())) }
    })
    .await;
    for (records, name) in [(system.kafka.read(system.events()).await, "event"), (acks, "ack")] {
        assert_eq!(records.len(), 4, "{records:?}");
        for record in &records {
            document.check(&format!("/components/schemas/{name}"), &record.json());
            document.check(&format!("/components/schemas/{name}Headers"), &headers(record));
        }
    }
}

/// As text; bytes that are none by their number.
fn headers(record: &Message) -> Value {
    let pairs = record
        .headers
        .iter()
        .map(|(name, value)| (name.clone(), json!(String::from_utf8_lossy(value.as_deref().unwrap_or_default()))));
    Value::Object(pairs.collect())
}
