//! What tools find out about the API by asking it.

use futures_util::TryStreamExt as _;
use prost::Message as _;
use prost_types::FileDescriptorProto;
use test_support::{Api, System, beside_others};
use tonic::{Code, Request};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, ServerReflectionResponse, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::channel;

/// What reflection answers; both versions of it have the same messages.
async fn reflected(api: &Api, version: &str, questions: Vec<MessageRequest>) -> Vec<MessageResponse> {
    let questions = questions
        .into_iter()
        .map(|question| ServerReflectionRequest { host: String::new(), message_request: Some(question) });
    let mut client = tonic::client::Grpc::new(channel(api));
    client.ready().await.expect("ready");
    let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo").parse().expect("a path");
    let codec = tonic_prost::ProstCodec::<_, ServerReflectionResponse>::default();
    let questions = Request::new(futures_util::stream::iter(questions.collect::<Vec<_>>()));
    let answers = client.streaming(questions, path, codec).await.expect("answers").into_inner();
    let answers: Vec<_> = answers.try_collect().await.expect("no error");
    answers.into_iter().map(|answer| answer.message_response.expect("an answer")).collect()
}

async fn services(api: &Api, version: &str) -> Vec<String> {
    let list = vec![MessageRequest::ListServices(String::new())];
    match &reflected(api, version, list).await[..] {
        [MessageResponse::ListServicesResponse(list)] => list.service.iter().map(|it| it.name.clone()).collect(),
        other => panic!("{other:?}"),
    }
}

async fn files(api: &Api, version: &str, questions: Vec<MessageRequest>) -> Vec<FileDescriptorProto> {
    let answers = reflected(api, version, questions).await;
    let bytes = answers.into_iter().flat_map(|answer| match answer {
        MessageResponse::FileDescriptorResponse(files) => files.file_descriptor_proto,
        other => panic!("{other:?}"),
    });
    bytes.map(|bytes| FileDescriptorProto::decode(&bytes[..]).expect("a descriptor")).collect()
}

/// Every method that is served, as `service/method`.
pub(crate) async fn methods(api: &Api) -> Vec<String> {
    let services = services(api, "v1").await;
    let questions = services.iter().cloned().map(MessageRequest::FileContainingSymbol).collect();
    let mut methods = Vec::new();
    for file in files(api, "v1", questions).await {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            assert!(services.contains(&name), "{name} is not among {services:?}");
            methods.extend(service.method.iter().map(|method| format!("{name}/{}", method.name())));
        }
    }
    methods
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_tells_old_tools_and_new_the_services_and_all_that_their_files_need() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let api = system.api().await;
    for version in ["v1", "v1alpha"] {
        let own = format!("grpc.reflection.{version}.ServerReflection");
        let mut names = services(&api, version).await;
        names.sort_unstable();
        let expected = ["grpc.health.v1.Health", &own, "order.OrderService", "orders.service.v1.OrdersService"];
        assert_eq!(names, expected, "{version}");
        let symbols = ["order.OrderService.GetOrder", "orders.service.v1.OrdersService", "orders.models.v1.OrderModel"];
        let questions = symbols.map(|name| MessageRequest::FileContainingSymbol(name.into()));
        let mut found = files(&api, version, questions.into()).await;
        assert_eq!(found.len(), symbols.len(), "{version}");
        // A tool asks for what a file imports by that file's name, until there is nothing left to ask for.
        while let Some(file) = found.pop() {
            let imports: Vec<_> = file.dependency.iter().cloned().map(MessageRequest::FileByFilename).collect();
            found.extend(files(&api, version, imports).await);
        }
    }
    let question = MessageRequest::FileContainingSymbol("orders.Nothing".into());
    let question = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let mut client = ServerReflectionClient::new(channel(&api));
    let answers = client.server_reflection_info(futures_util::stream::iter([question])).await.expect("answers");
    let unknown = answers.into_inner().message().await.expect_err("no such symbol");
    assert_eq!(unknown.code(), Code::NotFound);
}
