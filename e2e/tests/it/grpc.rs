//! gRPC beside HTTP, with a client made from the same `proto/`.

pub(crate) mod channel;
mod metadata;
pub(crate) mod reflection;

use std::time::Duration;

use channel::Channel;
use proto::order::{
    CreateOrderRequest, GetOrderRequest, OrderItem, OrderStatus, order_service_client::OrderServiceClient,
};
use proto::orders::service::v1::{
    GetOrderByExternalIdRequest, GetOrderByIdRequest, HealthRequest, UpsertOrderRequest, UpsertOrderResponse,
    orders_service_client::OrdersServiceClient,
};
use serde_json::{Value, json};
use test_support::{Api, System, alone, beside_few, beside_others, eventually, wait_for};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};
use tonic_types::StatusExt as _;

/// Generated from `proto/` by `make proto`.
#[allow(unused_qualifications, clippy::all)]
pub(crate) mod proto {
    pub mod order {
        include!("grpc/proto/order.rs");
    }
    pub mod orders {
        pub mod models {
            pub mod v1 {
                include!("grpc/proto/orders.models.v1.rs");
            }
        }
        pub mod service {
            pub mod v1 {
                include!("grpc/proto/orders.service.v1.rs");
            }
        }
    }
}

const NOBODYS_ORDER: &str = "0198f2a0-0000-7000-8000-000000000001";

pub(crate) fn channel(api: &Api) -> Channel {
    Channel::to(&api.grpc_address())
}

pub(crate) fn orders(api: &Api) -> OrdersServiceClient<Channel> {
    OrdersServiceClient::new(channel(api))
}

fn saga(api: &Api) -> OrderServiceClient<Channel> {
    OrderServiceClient::new(channel(api))
}

pub(crate) fn with<T>(message: T, metadata: &[(&'static str, &str)]) -> Request<T> {
    let mut request = Request::new(message);
    for (name, value) in metadata {
        request.metadata_mut().insert(*name, value.parse().expect("metadata"));
    }
    request
}

pub(crate) fn upsert(order_id: &str, user_id: &str, status: &str, payload: &Value) -> UpsertOrderRequest {
    let payload_json = if payload.is_null() { String::new() } else { payload.to_string() };
    UpsertOrderRequest { order_id: order_id.into(), user_id: user_id.into(), status: status.into(), payload_json }
}

pub(crate) fn by_id(order_id: &str) -> GetOrderByIdRequest {
    GetOrderByIdRequest { order_id: order_id.into() }
}

pub(crate) fn create(user_id: &str, items: &[(&str, i32, f64)]) -> CreateOrderRequest {
    let item = |&(product_id, quantity, price): &(&str, i32, f64)| OrderItem {
        product_id: product_id.into(),
        quantity,
        price,
    };
    CreateOrderRequest { user_id: user_id.into(), items: items.iter().map(item).collect() }
}

#[track_caller]
pub(crate) fn said<'a, T>(response: &'a Response<T>, name: &str) -> &'a str {
    let value = response.metadata().get(name).unwrap_or_else(|| panic!("no {name} in {:?}", response.metadata()));
    value.to_str().expect("text")
}

/// Code, reason and broken fields.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String, Vec<String>) {
    let status = result.expect_err("a refusal");
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let fields = details.bad_request().map(|bad| bad.field_violations.iter().map(|v| v.field.clone()).collect());
    let is_for_later = matches!(
        (status.code(), reason.as_str()),
        (Code::Unavailable, _) | (Code::Aborted, "IDEMPOTENCY") | (Code::ResourceExhausted, "RATE_LIMITED")
    );
    assert_eq!(details.retry_info().is_some(), is_for_later, "{status:?}");
    (status.code(), reason, fields.unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_created_read_updated_and_deleted_over_grpc_as_over_http() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let _worker = system.worker().await;
    let mut client = orders(&api);
    let health = client.health(HealthRequest {}).await.expect("health").into_inner();
    assert_eq!(health.status, "ok");

    let payload = json!({ "id": "ext-1", "items": [{ "product_id": "p", "quantity": 2, "unit_price": "19.99" }] });
    let created = client.upsert_order(upsert("0", "alice", "", &payload)).await.expect("created");
    let order_id = created.get_ref().order_id.clone();
    assert_eq!(created.get_ref().status, "created");
    assert_eq!((said(&created, "order-id"), said(&created, "version")), (order_id.as_str(), "1"));
    assert_eq!((said(&created, "order-status"), said(&created, "order-version")), ("done", "2"));
    assert_eq!((said(&created, "progress"), said(&created, "etag")), ("answered", "\"2\""));
    let path = format!("/orders/{order_id}/requests/{}", said(&created, "correlation-id"));
    assert_eq!(api.http().get(&path).await.expect_status(200).text("state"), "done");

    let read = client.get_order_by_id(by_id(&order_id)).await.expect("the order");
    assert_eq!(said(&read, "etag"), "\"2\"");
    let model = read.into_inner().order.expect("an order");
    let over_http = api.http().get(&format!("/orders/{order_id}")).await.expect_status(200).json();
    assert_eq!((model.user_id.as_str(), model.status.as_str(), model.amount), ("alice", "done", 39.98));
    assert_eq!(serde_json::from_str::<Value>(&model.payload_json).expect("JSON"), payload);
    assert_eq!(json!(model.created_at), over_http["created_at"]);
    assert_eq!(json!(model.updated_at), over_http["updated_at"]);
    assert_eq!(json!(model.bucket), over_http["bucket"]);
    let by_external = GetOrderByExternalIdRequest { external_id: "ext-1".into(), user_id: "alice".into() };
    let found = client.get_order_by_external_id(by_external).await.expect("found").into_inner();
    assert_eq!(found.order.expect("an order").order_id, order_id);

    // A repeat is safe here, too.
    let again = client.upsert_order(upsert("", "alice", "", &payload)).await.expect("a repeat");
    assert_eq!((again.get_ref().order_id.as_str(), said(&again, "progress")), (order_id.as_str(), "repeated"));

    let updated = with(upsert(&order_id, "", "", &json!({ "amount": 5 })), &[("prefer", "respond-async")]);
    let updated = client.upsert_order(updated).await.expect("updated");
    assert_eq!((updated.get_ref().status.as_str(), said(&updated, "version")), ("updated", "3"));
    assert_eq!((said(&updated, "progress"), said(&updated, "preference-applied")), ("stored", "respond-async"));
    let deleted = client.upsert_order(upsert(&order_id, "alice", "deleted", &Value::Null)).await.expect("deleted");
    assert_eq!((deleted.get_ref().status.as_str(), said(&deleted, "order-status")), ("deleted", "deleted"));
    let history = api.http().get(&format!("/orders/{order_id}/history")).await.expect_status(200).json();
    assert_eq!(history.as_array().expect("a list").len(), 6, "{history}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_of_the_saga_is_created_and_told_to_its_owner_alone() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let _worker = system.worker().await;
    let mut client = saga(&api);
    let created = client.create_order(create("7", &[("book", 2, 19.99), ("pen", 4, 1.25)])).await.expect("created");
    let order = created.into_inner().order.expect("an order");
    assert_eq!((order.user_id.as_str(), order.total_price), ("7", 44.98));
    assert_eq!(order.status(), OrderStatus::Pending);
    assert!(order.created_at.is_some_and(|at| at.seconds > 1_700_000_000));
    assert_eq!(order.items, create("7", &[("book", 2, 19.99), ("pen", 4, 1.25)]).items);
    let over_http = api.http().get(&format!("/orders/{}", order.id)).await.expect_status(200).json();
    assert_eq!(over_http["lifecycle"], "stock-saga");
    assert_eq!(over_http["items"][0]["unit_price"].to_string(), "19.99");

    let get = |user_id: &str| GetOrderRequest { order_id: order.id.clone(), user_id: user_id.into() };
    assert_eq!(client.get_order(get("7")).await.expect("the order").into_inner().order, Some(order.clone()));
    assert_eq!(refused(client.get_order(get("8")).await).0, Code::NotFound);
    assert_eq!(refused(client.get_order(get("")).await).2, ["user_id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_refusal_has_its_code_its_reason_and_its_fields() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let _worker = system.worker().await;
    let (mut orders, mut saga) = (orders(&api), saga(&api));
    let payload = json!({ "id": "taken", "amount": 1 });
    let taken = orders.upsert_order(upsert("", "u", "", &payload)).await.expect("created").into_inner().order_id;
    let deleted = orders.upsert_order(upsert("", "u", "", &json!({}))).await.expect("created").into_inner().order_id;
    orders.upsert_order(upsert(&deleted, "u", "deleted", &Value::Null)).await.expect("deleted");
    let fixed = saga.create_order(create("u", &[("p", 1, 1.0)])).await.expect("created");
    let fixed = fixed.into_inner().order.expect("an order").id;

    let cases: [(UpsertOrderRequest, Code, &str, &[&str]); 10] = [
        (upsert("1", "u", "", &Value::Null), Code::InvalidArgument, "MALFORMED", &[]),
        (upsert("", "", "", &json!({})), Code::InvalidArgument, "VALIDATION", &["user_id"]),
        (upsert("", "u", "new", &Value::Null), Code::InvalidArgument, "VALIDATION", &["status"]),
        (upsert("", "", "x", &json!([])), Code::InvalidArgument, "VALIDATION", &["status", "payload_json", "user_id"]),
        (upsert("", "u", "", &json!({ "a": ["\u{0}"] })), Code::InvalidArgument, "VALIDATION", &["payload_json.a[0]"]),
        (upsert(NOBODYS_ORDER, "u", "", &json!({})), Code::NotFound, "NOT_FOUND", &[]),
        (upsert("", "u", "", &json!({ "id": "taken" })), Code::AlreadyExists, "CONFLICT", &[]),
        (upsert(&deleted, "u", "", &json!({})), Code::FailedPrecondition, "DELETED", &[]),
        (upsert(&fixed, "u", "", &json!({ "amount": 2 })), Code::FailedPrecondition, "CONFLICT", &[]),
        (upsert("", "u", "", &json!({ "items": [] })), Code::FailedPrecondition, "REJECTED", &[]),
    ];
    for (message, code, reason, fields) in cases {
        let shown = format!("{message:?}");
        let (found, why, mut broken) = refused(orders.upsert_order(message).await);
        let mut fields = fields.to_vec();
        fields.sort_unstable();
        broken.sort_unstable();
        assert_eq!(
            (found, why.as_str(), broken),
            (code, reason, fields.iter().map(ToString::to_string).collect()),
            "{shown}"
        );
    }
    let conflict = orders.upsert_order(upsert("", "u", "", &json!({ "id": "taken" }))).await.expect_err("a conflict");
    let details = conflict.get_error_details();
    assert_eq!(details.error_info().expect("a reason").metadata["order_id"], taken);

    for (price, quantity, field) in [
        (f64::NAN, 1, "items[0].price"),
        (f64::INFINITY, 1, "items[0].price"),
        (-1.0, 1, "items[0].price"),
        (1e300, 1, "items[0].price"),
        (0.1 + 0.2, 1, "items[0].price"),
        (1.0, 0, "items[0].quantity"),
        (1.0, -5, "items[0].quantity"),
    ] {
        let (code, _, fields) = refused(saga.create_order(create("u", &[("p", quantity, price)])).await);
        assert_eq!((code, fields), (Code::InvalidArgument, vec![field.to_owned()]), "{price} × {quantity}");
    }
    assert_eq!(refused(saga.create_order(create("u", &[])).await).2, ["items"]);
    assert_eq!(refused(saga.create_order(create("u", &[("", 1, 1.0)])).await).2, ["items[0].product_id"]);
    for id in ["", "x"] {
        assert_eq!(refused(orders.get_order_by_id(by_id(id)).await).0, Code::InvalidArgument);
    }
    assert_eq!(refused(orders.get_order_by_id(by_id(NOBODYS_ORDER)).await).0, Code::NotFound);
    let nobodys = GetOrderByExternalIdRequest { external_id: "taken".into(), user_id: String::new() };
    assert_eq!(refused(orders.get_order_by_external_id(nobodys).await).2, ["user_id"]);
    let unknown = GetOrderByExternalIdRequest { external_id: String::new(), user_id: "u".into() };
    assert_eq!(refused(orders.get_order_by_external_id(unknown).await).0, Code::NotFound);
    let stored: i64 = system.db.client().query_one("select count(*) from orders", &[]).await.expect("a count").get(0);
    assert_eq!(stored, 4, "what was refused at the door is not stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_bounds_the_wait_and_the_caller_hears_what_is_stored_before_it() {
    let _turn = alone().await;
    let system = System::new().await;
    let api = system.api().await;
    let mut client = orders(&api);
    for (deadline, wait) in [(1000, "30"), (300, "30")] {
        let mut request = with(upsert("", "u", "", &json!({})), &[("prefer", &format!("wait={wait}"))]);
        request.set_timeout(Duration::from_millis(deadline));
        let began = Instant::now();
        let answer = client.upsert_order(request).await.expect("an answer in time");
        let took = began.elapsed();
        assert_eq!((answer.get_ref().status.as_str(), said(&answer, "progress")), ("created", "pending"));
        assert!(took < Duration::from_millis(deadline) && took > Duration::from_millis(deadline / 2), "{took:?}");
        client.get_order_by_id(by_id(&answer.into_inner().order_id)).await.expect("it is stored");
    }
    // Who asks for less waits less.
    let request = with(upsert("", "u", "", &json!({})), &[("prefer", "wait=1")]);
    let answer = client.upsert_order(request).await.expect("an answer");
    assert_eq!((said(&answer, "progress"), said(&answer, "preference-applied")), ("pending", "wait=1"));

    // Who hangs up leaves no waiter.
    let request = with(upsert("", "u", "", &json!({})), &[("prefer", "wait=30")]);
    let mut other = orders(&api);
    let parked = tokio::spawn(async move { other.upsert_order(request).await.map(|_| ()) });
    let waiters = |expected: f64| {
        let api = &api;
        async move {
            wait_for("the waiters", Duration::from_secs(10), || async {
                let waiters = api.http().metric("orderstream_waiters").await;
                if waiters == expected { Ok(()) } else { Err(waiters.to_string()) }
            })
            .await;
        }
    };
    waiters(1.0).await;
    parked.abort();
    waiters(0.0).await;
}

/// An upsert whose texts are any bytes.
#[derive(Clone, PartialEq, prost::Message)]
struct Bytes {
    #[prost(bytes = "vec", tag = "1")]
    order_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    user_id: Vec<u8>,
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_proper_client_sends_is_refused_and_stops_nobody() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let _worker = system.worker().await;
    let mut client = orders(&api);
    for megabytes in [1, 3, 40] {
        let payload = json!({ "a": "x".repeat(megabytes << 20) });
        let (code, reason, _) = refused(client.upsert_order(upsert("", "u", "", &payload)).await);
        assert!(matches!((code, reason.as_str()), (Code::ResourceExhausted, "TOO_LARGE")), "{code:?} {reason}");
    }
    let many: Vec<_> = (0..6000).map(|_| ("p", 1, 1.0)).collect();
    assert_eq!(refused(saga(&api).create_order(create("u", &many)).await).1, "TOO_LARGE");
    let mut raw = tonic::client::Grpc::new(channel(&api));
    raw.ready().await.expect("ready");
    let codec = tonic_prost::ProstCodec::<Bytes, UpsertOrderResponse>::default();
    let no_text = Bytes { order_id: vec![0xff, 0xfe], user_id: b"u".to_vec() };
    let path = "/orders.service.v1.OrdersService/UpsertOrder".parse().expect("a path");
    let status = raw.unary(Request::new(no_text), path, codec).await.expect_err("no text");
    assert_eq!(status.code(), Code::Internal, "as the protocol has it for what cannot be parsed: {status:?}");

    for (method, code) in [("/orders.service.v1.OrdersService/Nothing", 12), ("/nothing.Nothing/Nothing", 12)] {
        let codec = tonic_prost::ProstCodec::<Bytes, UpsertOrderResponse>::default();
        raw.ready().await.expect("ready");
        let path = method.parse().expect("a path");
        let status = raw.unary(Request::new(Bytes::default()), path, codec).await.expect_err("no such method");
        assert_eq!(status.code() as i32, code, "{status:?}");
    }
    for metadata in [("x-user-id", ""), ("traceparent", "nonsense"), ("prefer", "wait=-1"), ("grpc-timeout", "soon")] {
        client.upsert_order(with(upsert("", "u", "", &json!({})), &[metadata])).await.ok();
    }
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let garbage: [Vec<u8>; 4] = [
        b"GET /health HTTP/1.1\r\nhost: api\r\n\r\n".to_vec(),
        vec![0; 4096],
        [preface.as_slice(), &[0xff; 4096]].concat(),
        // HEADERS whose block is no HPACK.
        [preface.as_slice(), &[0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 4, 1, 5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].concat(),
    ];
    for bytes in garbage {
        let mut stream = TcpStream::connect(api.grpc_address()).await.expect("a connection");
        stream.write_all(&bytes).await.ok();
        let mut answer = Vec::new();
        let end = timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
        assert!(end.is_ok(), "the connection was not closed after {:?}", &bytes[..20]);
    }
    client.upsert_order(upsert("", "u", "", &json!({}))).await.expect("as before");
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_no_answers_holds_up_itself_alone() {
    const ASKED: usize = 900;
    let _turn = beside_few().await;
    let system = System::new().await;
    let api = system.api().await;
    let mut client = orders(&api);
    let large = with(upsert("", "u", "", &json!({ "a": "x".repeat(200_000) })), &[("prefer", "respond-async")]);
    let order_id = client.upsert_order(large).await.expect("created").into_inner().order_id;
    let before = api.memory_kib();
    // A window of one byte, so that each answer begins and none ends.
    let mut stream = TcpStream::connect(api.grpc_address()).await.expect("a connection");
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend([0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 1]);
    for call in 0..ASKED {
        let id = (2 * u32::try_from(call).expect("few") + 1).to_be_bytes();
        let mut block = vec![0x83, 0x86, 0x41, 1, b'a']; // POST, http, :authority
        for (name, value) in [
            (":path", "/orders.service.v1.OrdersService/GetOrderByID"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            let length = |text: &str| u8::try_from(text.len()).expect("short");
            block.extend([0, length(name)]);
            block.extend(name.bytes());
            block.push(length(value));
            block.extend(value.bytes());
        }
        bytes.extend([0, 0, u8::try_from(block.len()).expect("short"), 1, 4]);
        bytes.extend(id);
        bytes.extend(block);
        bytes.extend([0, 0, 43, 0, 1]);
        bytes.extend(id);
        bytes.extend([0, 0, 0, 0, 38, 10, 36]);
        bytes.extend(order_id.bytes());
    }
    stream.write_all(&bytes).await.expect("the questions");
    // Others are served meanwhile, long after those were read.
    let mut grown = 0;
    for _ in 0..500 {
        client.get_order_by_id(by_id(&order_id)).await.expect("the order");
        grown = grown.max(api.memory_kib().saturating_sub(before));
    }
    println!("{ASKED} answers of 200 KB not taken: {grown} KiB");
    assert!(grown < 64 * 1024, "{grown} KiB; all of them would be 180 MB at least");
    api.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_that_stops_answers_its_parked_calls_and_says_that_it_does_not_serve() {
    let _turn = beside_few().await;
    let system = System::new().await;
    let api = system.api_with(&[("SHUTDOWN_TIMEOUT_MS", "6000")]).await;
    let channel = channel(&api);
    let mut health = HealthClient::new(channel.clone());
    let named = |service: &str| HealthCheckRequest { service: service.into() };
    for service in ["", "order.OrderService", "orders.service.v1.OrdersService"] {
        let answer = health.check(named(service)).await.expect("an answer").into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    assert_eq!(health.check(named("other")).await.expect_err("unknown").code(), Code::NotFound);
    let mut watch = health.watch(named("")).await.expect("a watch").into_inner();
    let next = watch.message().await.expect("no error").expect("a status");
    assert_eq!(next.status(), ServingStatus::Serving);
    // A conversation that nobody ends.
    let (_questions, mut reflection) = {
        let (sender, receiver) = tokio::sync::mpsc::channel::<ServerReflectionRequest>(1);
        let questions =
            futures_util::stream::unfold(
                receiver,
                |mut receiver| async move { Some((receiver.recv().await?, receiver)) },
            );
        sender.send(list_services()).await.expect("a question");
        (sender, ServerReflectionClient::new(channel.clone()).server_reflection_info(questions).await.expect("answers"))
    };
    reflection.get_mut().message().await.expect("no error").expect("an answer");

    let calls: Vec<_> = (0..50)
        .map(|_| {
            let mut client = OrdersServiceClient::new(channel.clone());
            let request = with(upsert("", "u", "", &json!({})), &[("prefer", "wait=30")]);
            tokio::spawn(async move { client.upsert_order(request).await })
        })
        .collect();
    eventually("50 waiters", || async {
        let waiters = api.http().metric("orderstream_waiters").await;
        if waiters == 50.0 { Ok(()) } else { Err(waiters.to_string()) }
    })
    .await;
    api.sigterm();
    let next = watch.message().await.expect("no error").expect("a status");
    assert_eq!(next.status(), ServingStatus::NotServing);
    for call in calls {
        let answer = call.await.expect("no panic").expect("an answer");
        assert_eq!(said(&answer, "progress"), "pending");
    }
    let status = api.exit_within(Duration::from_secs(8)).await;
    assert!(status.success(), "exit {status}; its log:\n{}", api.log());
    assert!(!api.log().contains("did not end in time"), "{}", api.log());
}

fn list_services() -> ServerReflectionRequest {
    ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_away_is_unavailable_and_says_when_to_try_again() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    system.set("POSTGRES_DSN", "postgres://postgres@127.0.0.1:1/none");
    let api = Api::spawn(&system.settings()).await;
    let mut client = orders(&api);
    let (code, reason, _) = refused(client.upsert_order(upsert("", "u", "", &json!({}))).await);
    assert_eq!((code, reason.as_str()), (Code::Unavailable, "UNAVAILABLE"));
    let mut health = HealthClient::new(channel(&api));
    let answer = health.check(HealthCheckRequest::default()).await.expect("an answer").into_inner();
    assert_eq!(answer.status(), ServingStatus::NotServing);
}
