//! Each method of gRPC's services.

use bytes::{Buf as _, BufMut as _};
use prost::Message as _;
use serde_json::{Value, json};
use test_support::{Api, System, beside_others};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Response, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use super::{Caller, JWT, bad_tokens, by_header, by_token, claims, pretender, signed};
use crate::grpc::channel::Channel;
use crate::grpc::proto::{
    order::{CreateOrderResponse, GetOrderRequest},
    orders::service::v1::{GetOrderByExternalIdRequest, UpsertOrderResponse},
};
use crate::grpc::{by_id, channel, create, reflection::methods, refused, said, upsert, with};

const UPSERT: &str = "orders.service.v1.OrdersService/UpsertOrder";
const BY_ID: &str = "orders.service.v1.OrdersService/GetOrderByID";
const BY_EXTERNAL: &str = "orders.service.v1.OrdersService/GetOrderByExternalID";
const CREATE: &str = "order.OrderService/CreateOrder";
const GET: &str = "order.OrderService/GetOrder";
/// Those that are nobody's.
const OPEN: &[&str] = &["orders.service.v1.OrdersService/Health", "grpc.health.v1.Health/Check"];
/// Those of them that are conversations.
const OPEN_STREAMS: &[&str] =
    &["grpc.health.v1.Health/Watch", "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"];

/// A method, a message to it, and how it answers: somebody else than the owner of what the message names, and
/// somebody with a role.
type Row = (&'static str, Vec<u8>, Code, Code);

/// Every method, in an order in which they can be called.
fn rows(owned: &Owned) -> Vec<Row> {
    use Code::{InvalidArgument, NotFound, Ok};
    let Owned { order, saga, external } = owned;
    let upsert =
        |order_id: &str, user_id: &str, payload: &Value| upsert(order_id, user_id, "", payload).encode_to_vec();
    let delete = |user_id: &str| self::upsert(order, user_id, "deleted", &Value::Null).encode_to_vec();
    let by_external = |user_id: &str| {
        GetOrderByExternalIdRequest { external_id: external.clone(), user_id: user_id.into() }.encode_to_vec()
    };
    let get = |order_id: &String, user_id: &str| {
        GetOrderRequest { order_id: order_id.clone(), user_id: user_id.into() }.encode_to_vec()
    };
    let payload = json!({ "amount": 1 });
    vec![
        (BY_ID, by_id(order).encode_to_vec(), NotFound, Ok),
        (BY_ID, by_id(saga).encode_to_vec(), NotFound, Ok),
        (BY_EXTERNAL, by_external("owner"), NotFound, Ok),
        // Without a user it is the caller's own that is looked for.
        (BY_EXTERNAL, by_external(""), NotFound, NotFound),
        (BY_EXTERNAL, by_external("thief"), NotFound, NotFound),
        (GET, get(order, "owner"), NotFound, Ok),
        (GET, get(saga, "owner"), NotFound, Ok),
        (GET, get(saga, ""), NotFound, Ok),
        // An order of that user: there is none of this id.
        (GET, get(saga, "thief"), NotFound, NotFound),
        (UPSERT, upsert(order, "", &payload), NotFound, Ok),
        (UPSERT, upsert(order, "thief", &payload), NotFound, NotFound),
        // The message names another user than the caller is: that alone is wrong, whatever else it names.
        (UPSERT, upsert(order, "owner", &payload), InvalidArgument, Ok),
        (UPSERT, upsert("", "owner", &payload), InvalidArgument, Ok),
        (CREATE, create("owner", &[("p", 1, 1.0)]).encode_to_vec(), InvalidArgument, Ok),
        (UPSERT, delete("owner"), InvalidArgument, Ok),
        (UPSERT, delete(""), NotFound, Ok),
    ]
}

/// Messages as they are on the wire: one table has all kinds of them.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining()).into()))
    }
}

impl Caller {
    /// Nobody waits for a worker here: there is none, so that orders change by calls alone.
    async fn call(&self, channel: &Channel, method: &str, message: &[u8]) -> Result<Response<Vec<u8>>, Status> {
        let who = self.0.iter().map(|(name, value)| (*name, value.as_str()));
        let metadata: Vec<_> = who.chain([("prefer", "respond-async")]).collect();
        let mut client = Grpc::new(channel.clone());
        client.ready().await.expect("a connection");
        let path = format!("/{method}").parse().expect("a path");
        client.unary(with(message.to_vec(), &metadata), path, Raw).await
    }
}

/// What the rows name: an order by each service.
struct Owned {
    order: String,
    saga: String,
    external: String,
}

impl Owned {
    /// Of this caller, who says only in metadata who it is.
    async fn by(owner: &Caller, channel: &Channel, external: &str) -> Self {
        let order = upsert("", "", "", &json!({ "id": external, "amount": 5 })).encode_to_vec();
        let order = owner.call(channel, UPSERT, &order).await.expect("created").into_inner();
        let saga = create("", &[("p", 1, 1.0)]).encode_to_vec();
        let saga = owner.call(channel, CREATE, &saga).await.expect("created").into_inner();
        let saga = CreateOrderResponse::decode(&saga[..]).expect("an answer").order.expect("an order");
        assert_eq!(saga.user_id, "owner");
        Self {
            order: UpsertOrderResponse::decode(&order[..]).expect("an answer").order_id,
            saga: saga.id,
            external: external.to_owned(),
        }
    }

    /// Both orders, with their versions, to the byte.
    async fn read(&self, owner: &Caller, channel: &Channel) -> Vec<(String, Vec<u8>)> {
        let get = GetOrderRequest { order_id: self.saga.clone(), user_id: String::new() };
        let mut read = Vec::new();
        for (method, message) in [(BY_ID, by_id(&self.order).encode_to_vec()), (GET, get.encode_to_vec())] {
            let answer = owner.call(channel, method, &message).await.expect("the owner's own");
            read.push((said(&answer, "etag").to_owned(), answer.into_inner()));
        }
        read
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_is_in_the_table_and_those_outside_it_are_everybodys() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("AUTH_MODE", "header")]).await;
    let rows = rows(&Owned { order: String::new(), saga: String::new(), external: String::new() });
    let known: Vec<&str> = rows.iter().map(|(method, ..)| *method).collect();
    // As reflection tells it, which asks nobody who it is.
    let served = methods(&api).await;
    for method in &served {
        let method = method.as_str();
        let is_known = [&known[..], OPEN, OPEN_STREAMS].iter().any(|all| all.contains(&method));
        assert!(is_known, "the table of identities lacks {method}");
    }
    for method in known.iter().chain(OPEN).chain(OPEN_STREAMS) {
        assert!(served.iter().any(|name| name == method), "{method} is not served: {served:?}");
    }
    let channel = channel(&api);
    for method in OPEN {
        Caller(vec![]).call(&channel, method, &[]).await.expect(method);
    }
    HealthClient::new(channel).watch(HealthCheckRequest::default()).await.expect("a watch");
}

async fn others_see_and_change_nothing(system: &System, api: &Api, caller: fn(&str, Option<&str>) -> Caller) {
    let channel = channel(api);
    let (owner, thief) = (caller("owner", None), caller("thief", None));
    for role in ["service", "admin"] {
        let owned = Owned::by(&owner, &channel, &format!("market-{role}")).await;
        let before = owned.read(&owner, &channel).await;
        let stored = system.db.number("select count(*) from orders", &[]).await;
        for (method, message, expected, _) in rows(&owned) {
            let shown = format!("{method} {:?}", String::from_utf8_lossy(&message));
            let (code, reason, fields) = refused(thief.call(&channel, method, &message).await);
            assert_eq!(code, expected, "{shown}");
            // As of an order that is nowhere; or it is said that the user is another, and nothing of the order.
            let told = if code == Code::NotFound { ("NOT_FOUND", &[][..]) } else { ("VALIDATION", &["user_id"][..]) };
            assert_eq!((reason.as_str(), &fields.iter().map(String::as_str).collect::<Vec<_>>()[..]), told, "{shown}");
            let (code, reason, _) = refused(Caller(vec![]).call(&channel, method, &message).await);
            assert_eq!((code, reason.as_str()), (Code::Unauthenticated, "UNAUTHENTICATED"), "{shown}");
        }
        assert_eq!(owned.read(&owner, &channel).await, before);
        assert_eq!(system.db.number("select count(*) from orders", &[]).await, stored, "somebody has stored another");

        // Who has a role crosses users. So what was refused above was there to be had.
        let service = caller("shop", Some(role));
        for (method, message, _, expected) in rows(&owned) {
            let code = service.call(&channel, method, &message).await.map_or_else(|status| status.code(), |_| Code::Ok);
            assert_eq!(code, expected, "{role}: {method} {:?}", String::from_utf8_lossy(&message));
        }
        assert_ne!(owned.read(&owner, &channel).await, before);
    }
    let whose = system.db.lines("select distinct user_id from orders", &[]).await;
    assert_eq!(whose, ["owner"], "what is created for another is the other's");
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_gateway_others_see_and_change_nothing_over_grpc() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(&[("AUTH_MODE", "header")]).await;
    others_see_and_change_nothing(&system, &api, by_header).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tokens_others_see_and_change_nothing_over_grpc() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(JWT).await;
    others_see_and_change_nothing(&system, &api, by_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_ours_calls_nothing() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api_with(JWT).await;
    let channel = channel(&api);
    let owner = by_token("owner", None);
    let owned = Owned::by(&owner, &channel, "market-1").await;
    let before = owned.read(&owner, &channel).await;
    for (what, token) in bad_tokens("owner") {
        let caller = pretender("owner", &token);
        for (method, message, ..) in rows(&owned) {
            let (code, reason, _) = refused(caller.call(&channel, method, &message).await);
            assert_eq!((code, reason.as_str()), (Code::Unauthenticated, "UNAUTHENTICATED"), "{what}: {method}");
        }
        for method in OPEN {
            caller.call(&channel, method, &[]).await.expect(method);
        }
    }
    assert_eq!(owned.read(&owner, &channel).await, before);
    assert_eq!(system.db.number("select count(*) from orders", &[]).await, 2);
    // The token says who it is: a gateway's words have no say, and nothing is wrong with them either.
    let both = pretender("owner", &signed(&claims("thief")));
    assert_eq!(refused(both.call(&channel, BY_ID, &by_id(&owned.order).encode_to_vec()).await).0, Code::NotFound);
}
