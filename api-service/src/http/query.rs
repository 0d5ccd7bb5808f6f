//! Query parameters. A route takes those that its document names, each once; any other is refused by its
//! name before the handler runs. A filter that is misspelt, or that only another service has, would
//! otherwise be passed over, and the caller would take everybody's orders for those it asked for.

use std::{collections::HashMap, sync::Arc};

use axum::{
    extract::{FromRequestParts, MatchedPath, Query, Request, State},
    http::{Method, Uri, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use serde::de::DeserializeOwned;
use shared::order::{Violation, escape};
use utoipa::openapi::{
    OpenApi,
    path::{Operation, ParameterIn},
};

use crate::error::Problem;

/// Load balancers add a parameter of their own so that no cache answers, and a process that is well must not
/// be taken for a sick one: here parameters are passed over.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

/// What a query says, to a handler. Its fields are those that the handler's document has.
pub(super) struct Asked<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        read(&parts.uri).map(Self)
    }
}

fn read<T: DeserializeOwned>(uri: &Uri) -> Result<T, Problem> {
    Query::try_from_uri(uri).map(|Query(read)| read).map_err(|error| Problem::Malformed(error.body_text()))
}

/// What each route takes: by its path as the router has it, then by method. A route that is not in here
/// takes nothing.
pub(super) struct Parameters(HashMap<String, Vec<(Method, Vec<String>)>>);

impl Parameters {
    /// Those of a document.
    pub(super) fn of(document: &OpenApi) -> Self {
        let routes = document.paths.paths.iter().map(|(path, item)| {
            let methods = [
                (Method::GET, &item.get),
                (Method::POST, &item.post),
                (Method::PUT, &item.put),
                (Method::PATCH, &item.patch),
            ];
            let methods = methods.into_iter().filter_map(|(method, at)| Some((method, in_query(at.as_ref()?))));
            (path.clone(), methods.collect())
        });
        Self(routes.collect())
    }

    /// Those of routes that no document has.
    pub(super) fn new(routes: &[(&str, Method, &[&str])]) -> Self {
        let mut parameters = HashMap::<_, Vec<_>>::new();
        for (path, method, names) in routes {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            parameters.entry((*path).to_owned()).or_default().push((method.clone(), names));
        }
        Self(parameters)
    }

    /// # Errors
    /// Naming each parameter that this route does not take, or not more than once.
    fn check(&self, method: &Method, path: &str, pairs: &[(String, String)]) -> Result<(), Problem> {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let taken = match self.0.get(path) {
            // A method that the route does not have is refused for that.
            Some(methods) => match methods.iter().find(|(known, _)| known == method) {
                Some((_, names)) => names.as_slice(),
                None => return Ok(()),
            },
            None => &[],
        };
        let mut violations: Vec<Violation> = Vec::new();
        for (index, (name, _)) in pairs.iter().enumerate() {
            let reason = if !taken.contains(name) {
                let taken = if taken.is_empty() { "none".to_owned() } else { taken.join(", ") };
                format!("is not a parameter of this route, which takes {taken}")
            } else if pairs[..index].iter().any(|(before, _)| before == name) {
                "is given twice".to_owned()
            } else {
                continue;
            };
            violations.push(Violation::new(format!("/{}", escape(name)), reason));
        }
        if violations.is_empty() { Ok(()) } else { Err(Problem::Parameters(violations)) }
    }
}

fn in_query(operation: &Operation) -> Vec<String> {
    let parameters = operation.parameters.iter().flatten();
    let in_query = parameters.filter(|parameter| matches!(parameter.parameter_in, ParameterIn::Query));
    in_query.map(|parameter| parameter.name.clone()).collect()
}

/// Lets a request through whose parameters its route takes. A layer of the routes.
pub(super) async fn check(State(parameters): State<Arc<Parameters>>, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if !PROBES.contains(&path) {
        let checked = read(request.uri()).and_then(|pairs: Vec<_>| parameters.check(request.method(), path, &pairs));
        if let Err(problem) = checked {
            return problem.into_response();
        }
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_parameter_is_refused_by_name() {
        let parameters =
            Parameters::new(&[("/orders", Method::GET, &["status", "limit"]), ("/orders", Method::POST, &[])]);
        let refused = |method: Method, path: &str, query: &str| {
            let pairs: Vec<_> = read(&format!("/?{query}").parse().unwrap()).unwrap();
            match parameters.check(&method, path, &pairs) {
                Ok(()) => Vec::new(),
                Err(Problem::Parameters(violations)) => violations.iter().map(ToString::to_string).collect(),
                Err(other) => panic!("{other:?}"),
            }
        };
        let none: [&str; 0] = [];
        assert_eq!(refused(Method::GET, "/orders", "status=new&limit=1"), none);
        assert_eq!(refused(Method::HEAD, "/orders", "status=new"), none);
        assert_eq!(refused(Method::DELETE, "/orders", "status=new"), none);
        for (method, path, query, said) in [
            (Method::GET, "/orders", "page=1", "/page is not a parameter of this route, which takes status, limit"),
            (Method::GET, "/orders", "=1", "/ is not a parameter of this route, which takes status, limit"),
            (Method::GET, "/orders", "a/b~=1", "/a~1b~0 is not a parameter of this route, which takes status, limit"),
            (Method::GET, "/orders", "status=new&%73tatus=new", "/status is given twice"),
            (Method::POST, "/orders", "limit=1", "/limit is not a parameter of this route, which takes none"),
            (Method::GET, "/elsewhere", "limit=1", "/limit is not a parameter of this route, which takes none"),
        ] {
            assert_eq!(refused(method, path, query), [said], "{query}");
        }
        assert_eq!(refused(Method::GET, "/orders", "a&b&limit&limit").len(), 3);
    }
}
