//! What operators use: the command line, and the routes of their own listener.

use std::time::Duration;

use serde_json::{Value, json};
use test_support::{
    Api, Method, Record, Settings, System, Worker, beside_others, eventually, order, refused_at_start, run_to_end,
    run_without_a_reader,
};

use crate::lifecycles::Folder;

#[tokio::test(flavor = "multi_thread")]
async fn parked_messages_are_listed_shown_redriven_and_discarded_on_the_command_line() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let topic = format!("{}.results", system.events());
    let settings = system.settings().with(&[("PAYMENT_RESULTS_TOPIC", &topic)]);
    let _worker = Worker::start(&settings).await;
    let bodies = ["no JSON", r#"{"order_id":"a","status":"perhaps"}"#];
    system.kafka.produce_all(&topic, bodies.map(|body| Record::new("key", body)).to_vec()).await;
    let of = async |args: &[&str]| run_to_end("worker", args, &settings).await;
    let listed = async |args: &[&str]| -> Vec<Value> {
        let (code, out) = of(&[&["parked", "list", "--json"], args].concat()).await;
        assert_eq!(code, Some(0), "{out}");
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error} in {out}"))
    };
    eventually("both to be parked", || async {
        let parked = listed(&[]).await;
        if parked.len() == 2 { Ok(()) } else { Err(format!("{parked:?}")) }
    })
    .await;

    let (code, table) = of(&["parked", "list", "--topic", &topic, "--state", "dead"]).await;
    assert_eq!(code, Some(0), "{table}");
    assert!(table.starts_with("ID") && table.contains("unreadable") && table.contains("none of failed"), "{table}");
    assert_eq!(listed(&["--limit", "1"]).await.len(), 1);
    let second = listed(&["--reason", "perhaps"]).await[0]["id"].to_string();
    let (code, shown) = of(&["parked", "show", &second]).await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains(bodies[1]) && shown.contains("key      key"), "{shown}");
    assert_eq!(of(&["parked", "show", "999999"]).await.0, Some(1));

    // To mean everything takes saying so.
    let (code, said) = of(&["parked", "discard"]).await;
    assert_eq!(code, Some(1), "{said}");
    let (code, said) = of(&["parked", "discard", "--reason", ""]).await;
    assert_eq!(code, Some(2), "{said}");
    let (code, said) = of(&["parked", "redrive", "--id", &second]).await;
    assert_eq!((code, said.trim()), (Some(0), "1 to be tried again"));
    eventually("it to be tried and found as bad as before", || async {
        let parked = listed(&["--id", &second]).await;
        if parked[0]["state"] == "dead" && parked[0]["attempts"] == 1 { Ok(()) } else { Err(format!("{parked:?}")) }
    })
    .await;
    let (code, said) = of(&["parked", "discard", "--id", "999999"]).await;
    assert!(code == Some(1) && said.contains("message 999999 is done with, or is not there"), "{said}");
    let (code, said) = of(&["stuck"]).await;
    assert_eq!((code, said.trim()), (Some(0), "nothing is stuck"));
    let (code, said) = of(&["parked", "discard", "--all"]).await;
    assert_eq!((code, said.trim()), (Some(0), "2 discarded"));
    assert!(listed(&[]).await.is_empty());
    assert_eq!(listed(&["--state", "discarded"]).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_first_ends_every_command_in_silence() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let topic = format!("{}.results", system.events());
    let settings = system.settings().clone().with(&[("PAYMENT_RESULTS_TOPIC", &topic)]);
    let (api, worker) = (Api::start(&settings).await, Worker::start(&settings).await);
    let order_id = api.http().post_order(&order("alice")).await.expect_status(201).text("order_id");
    system.kafka.produce_all(&topic, vec![Record::new("key", "no JSON")]).await;
    let listed = eventually("a parked message", || async {
        let (_, listed) = run_to_end("worker", &["parked", "list", "--json"], &settings).await;
        let parked: Vec<Value> = serde_json::from_str(&listed).map_err(|_| listed)?;
        parked.first().map(|message| message["id"].to_string()).ok_or_else(|| "none".to_owned())
    })
    .await;
    let folder = Folder::with("retail.toml", include_str!("../../../lifecycles/retail.toml"));
    let file = format!("{}/retail.toml", folder.path());
    let folder = Folder::with("orders.ndjson", &format!("{}\n", order("bulk")));
    let orders = format!("{}/orders.ndjson", folder.path());
    let client = settings.clone().with(&[("ORDERSTREAM_URL", &format!("http://{}", api.http().address()))]);
    for (binary, args) in [
        ("worker", &["parked", "list"][..]),
        ("worker", &["parked", "list", "--json"]),
        ("worker", &["parked", "show", &listed]),
        ("worker", &["parked", "redrive", "--topic", &topic]),
        ("worker", &["stuck"]),
        ("worker", &["stuck", "--json"]),
        ("worker", &["lifecycle", "graph", "shipment"]),
        ("worker", &["lifecycle", "check", &file]),
        ("worker", &["--help"]),
        ("api-service", &["migrate"]),
        ("api-service", &["--help"]),
        ("orderstream", &["list"]),
        ("orderstream", &["list", "--json"]),
        ("orderstream", &["get", &order_id]),
        ("orderstream", &["history", &order_id]),
        ("orderstream", &["watch", "--since", "0", &order_id]),
        ("orderstream", &["bulk", &orders]),
        ("orderstream", &["bulk", "--json", &orders]),
        ("orderstream", &["completions", "bash"]),
        ("orderstream", &["--help"]),
    ] {
        for unread_errors in [false, true] {
            let (code, said) = run_without_a_reader(binary, args, &client, unread_errors).await;
            // What clap prints itself ends as if all were read.
            let ends = matches!(code, Some(141)) || (code == Some(0) && args == ["--help"]);
            assert!(ends, "{binary} {args:?} ended with {code:?}: {said}");
            let is_silent = !said.contains("panicked") && !said.contains("error");
            assert!(is_silent, "{binary} {args:?}: {said}");
        }
    }
    // An error that nobody reads is an error, and no panic.
    let (code, _) = run_without_a_reader("worker", &["parked", "show", "999999"], &settings, true).await;
    assert_eq!(code, Some(1));
    api.assert_healthy().await;
    worker.assert_healthy().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_go_on_when_nobody_reads_their_log() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let settings = system.settings().clone().with(&[("LOG_LEVEL", "debug")]);
    let (api, worker) = (Api::start_unread(&settings).await, Worker::start_unread(&settings).await);
    api.http().post_order(&order("alice")).await.expect_status(201);
    api.assert_healthy().await;
    worker.assert_healthy().await;
    api.sigterm();
    worker.sigterm();
    assert!(api.exit_within(Duration::from_secs(20)).await.success());
    assert!(worker.exit_within(Duration::from_secs(20)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_whose_event_was_lost_is_seen_and_told_of_again() {
    let _turn = beside_others().await;
    let mut system = System::new().await;
    let (api, settings) = (system.api().await, system.settings().clone());
    let stuck = async || run_to_end("worker", &["stuck"], &settings).await.1;
    let order_id = api.http().post_order_async(&order("alice")).await.expect_status(201).text("order_id");
    system.db.execute("update orders set created_at = created_at - interval '2 minutes'").await;
    eventually("the order to be seen", || async {
        let said = stuck().await;
        let seen = said.starts_with(&format!("unhandled order {order_id} (marketplace, new)"));
        if seen { Ok(()) } else { Err(said) }
    })
    .await;
    // A worker that begins behind it.
    system.set("ORDERS_EVENTS_TOPIC", format!("{}.again", system.events()));
    let (api, _worker) = (system.api().await, system.worker().await);
    api.http().post_order(&json!({ "order_id": order_id })).await.expect_status(200);
    assert_eq!(stuck().await.trim(), "nothing is stuck");
}

#[tokio::test(flavor = "multi_thread")]
async fn lifecycles_are_checked_and_drawn_on_the_command_line() {
    let _turn = beside_others().await;
    let settings = Settings::default();
    let (code, drawn) = run_to_end("worker", &["lifecycle", "graph", "shipment"], &settings).await;
    assert_eq!(code, Some(0), "{drawn}");
    assert!(drawn.contains("stateDiagram-v2") && drawn.contains("Created --> WaitingForShipment"), "{drawn}");
    let (code, said) = run_to_end("worker", &["lifecycle", "graph", "reincarnation"], &settings).await;
    assert!(code == Some(1) && said.contains("there are marketplace, payment"), "{said}");

    let sound = include_str!("../../../lifecycles/retail.toml");
    let folder = Folder::with("retail.toml", sound);
    let file = format!("{}/retail.toml", folder.path());
    let (code, said) = run_to_end("worker", &["lifecycle", "check", &file], &settings).await;
    assert!(code == Some(0) && said.contains("retail is sound: 5 states"), "{said}");
    let folder = Folder::with("retail.toml", &sound.replace("to = \"shipped\"", "to = \"chipped\""));
    let file = format!("{}/retail.toml", folder.path());
    let (code, said) = run_to_end("worker", &["lifecycle", "check", &file], &settings).await;
    assert!(code == Some(1) && said.contains("transitions[1].to") && said.contains("declare it"), "{said}");
    // Sound by itself, and in the way of another.
    let clash = include_str!("../../../lifecycles/payment.toml").replace("name = \"payment\"", "name = \"pay\"");
    let folder = Folder::with("pay.toml", &clash);
    let file = format!("{}/pay.toml", folder.path());
    let (code, said) = run_to_end("worker", &["lifecycle", "check", &file], &settings).await;
    assert!(code == Some(1) && said.contains("payment-results is received by pay already"), "{said}");
    // Beside a file of the folder that has the same name, as a service that starts would find it.
    let folder = Folder::with("mine.toml", sound);
    let file = format!("{}/retail.toml", folder.path());
    std::fs::write(&file, sound).expect("another file");
    let settings = settings.with(&[("LIFECYCLES_DIR", &folder.path())]);
    let (code, said) = run_to_end("worker", &["lifecycle", "check", &file], &settings).await;
    assert!(code == Some(1) && said.contains("retail.toml: name") && said.contains("mine.toml too"), "{said}");
    std::fs::remove_file(format!("{}/mine.toml", folder.path())).expect("one file less");
    let (code, said) = run_to_end("worker", &["lifecycle", "check", &file], &settings).await;
    assert!(code == Some(0) && said.contains("retail is sound"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn away_from_loopback_operators_must_say_who_they_are() {
    let _turn = beside_others().await;
    let open = Settings::default().with(&[("ADMIN_PORT", "0.0.0.0:0")]);
    let said = refused_at_start("api-service", &open).await;
    assert!(said.contains("ADMIN_PORT") && said.contains("ADMIN_TOKEN"), "{said}");

    let system = System::new().await;
    let settings = system.settings().with(&[("ADMIN_PORT", "0.0.0.0:0"), ("ADMIN_TOKEN", "s3cr3t")]);
    let api = Api::start(&settings).await;
    let admin = api.admin();
    for (headers, status) in [
        (vec![], 401),
        (vec![("authorization", "Bearer s3cr3")], 401),
        (vec![("authorization", "s3cr3t")], 401),
        (vec![("authorization", "Bearer s3cr3t")], 200),
    ] {
        for path in ["/admin/parked", "/admin/stuck"] {
            let reply = admin.send(Method::GET, path, &headers, Default::default()).await.expect("an answer");
            assert_eq!(reply.status, status, "{path} {headers:?}: {}", reply.summary());
        }
    }
    assert!(!api.log().contains("s3cr3t"));
    // And not on the listener that everybody reaches.
    api.http().get("/admin/parked").await.expect_status(404);
    api.sigterm();
    assert!(api.exit_within(Duration::from_secs(15)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_of_operators_and_movers_are_named() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    let admin = api.admin();
    for (method, path, status) in [
        (Method::GET, "/admin/parked?limit=0", 422),
        (Method::GET, "/admin/parked?limit=many", 400),
        (Method::GET, "/admin/parked?state=lost", 400),
        (Method::GET, "/admin/parked?colour=red", 400),
        (Method::GET, "/admin/parked?state=dead&%73tate=dead", 400),
        (Method::GET, "/admin/parked/1?json=1", 400),
        (Method::GET, "/admin/stuck?limit=1", 400),
        (Method::POST, "/admin/parked/1/redrive?all=1", 400),
        (Method::GET, "/admin/parked/x", 404),
        (Method::GET, "/admin/parked/1", 404),
        (Method::POST, "/admin/parked/1/redrive", 404),
        (Method::POST, "/admin/parked/1/discard", 404),
        (Method::POST, "/admin/parked/redrive", 422),
        (Method::POST, "/admin/parked/discard?cursor=3", 400),
        (Method::POST, "/admin/parked/discard?state=dead&limit=10", 400),
        (Method::POST, "/admin/parked/discard?reason=", 400),
        (Method::POST, "/admin/parked/redrive?topic=", 400),
        (Method::DELETE, "/admin/parked", 405),
        (Method::GET, "/admin", 404),
    ] {
        let reply = admin.send(method.clone(), path, &[], Default::default()).await.expect("an answer");
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.summary());
        reply.problem();
    }
    // A page's, by its own name or by one that leads here.
    for header in [
        ("origin", "https://elsewhere.example"),
        ("sec-fetch-site", "same-origin"),
        ("host", "elsewhere.example"),
        ("host", "127.0.0.1.elsewhere.example:9080"),
    ] {
        let foreign =
            admin.send(Method::POST, "/admin/parked/discard?kind=failed", &[header], Default::default()).await;
        foreign.expect("an answer").expect_status(403);
    }
    for host in ["localhost:9080", "[::1]", "127.0.0.1"] {
        let own = admin.send(Method::GET, "/admin/parked", &[("host", host)], Default::default()).await;
        own.expect("an answer").expect_status(200);
    }
    let order_id = api.http().post_order_async(&order("user")).await.expect_status(201).text("order_id");
    let long = "x".repeat(300);
    for (method, path, body, status) in [
        (Method::PUT, format!("/orders/{order_id}/status"), "{", 400),
        (Method::PUT, format!("/orders/{order_id}/status"), "{}", 422),
        (Method::PUT, format!("/orders/{order_id}/status"), r#"{"status":7}"#, 422),
        (Method::PUT, format!("/orders/{order_id}/status"), r#"["processing"]"#, 422),
        (Method::PUT, format!("/orders/{order_id}/status"), r#"{"status":"done","by":"me"}"#, 422),
        (Method::PUT, format!("/orders/{order_id}/status"), r#"{"status":"deleted"}"#, 422),
        (Method::PUT, format!("/orders/{order_id}/status"), r#"{"status":"\u0000"}"#, 422),
        (Method::PATCH, "/orders/nobody's/status".to_owned(), r#"{"status":"done"}"#, 404),
        (Method::PATCH, "/orders/%00/status".to_owned(), r#"{"status":"done"}"#, 404),
        (Method::PATCH, format!("/orders/{long}/status"), r#"{"status":"done"}"#, 404),
        (Method::POST, format!("/orders/{order_id}/status"), r#"{"status":"done"}"#, 405),
        (Method::POST, "/orders/nobody's/cancel".to_owned(), "", 404),
    ] {
        let headers = [("content-type", "application/json")];
        let reply = api.http().send(method.clone(), &path, &headers, body.into()).await.expect("an answer");
        assert_eq!(reply.status, status, "{method} {path} {body}: {}", reply.summary());
        reply.problem();
    }
    // Somebody else's order is not there.
    let headers = [("content-type", "application/json"), ("x-user-id", "somebody else")];
    let path = format!("/orders/{order_id}/status");
    let reply = api.http().send(Method::PUT, &path, &headers, r#"{"status":"processing"}"#.into()).await;
    reply.expect("an answer").expect_status(404);
    api.assert_healthy().await;
}
