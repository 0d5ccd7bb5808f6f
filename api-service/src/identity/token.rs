//! Signed tokens (RFC 7519): the keys that they are checked with, and what is read from them.
//!
//! The algorithm is the key's, never the token's choice: a public key is no HMAC secret, and
//! `none` is none of ours.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, Validation, decode, decode_header,
    errors::ErrorKind,
    jwk::{Jwk, JwkSet, PublicKeyUse},
};
use serde_json::Value;
use shared::message::unmarked;
use tokio_util::sync::CancellationToken;

/// How often a JWKS file is read again: so long a new key may be unknown, and an old one good.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);
/// Clocks differ.
const LEEWAY: Duration = Duration::from_secs(30);
/// RFC 7518, section 3.2: as long as the hash.
const SHORTEST_SECRET: usize = 32;

/// What is read from a token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Claims {
    pub sub: String,
    pub roles: Vec<String>,
}

/// Where the keys come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    Secret(Arc<str>),
    /// A public key: RSA, EC or Ed25519.
    Pem(PathBuf),
    Jwks(PathBuf),
}

/// The keys of the moment.
pub(crate) struct Tokens {
    validation: Validation,
    /// The name of a claim, or a JSON pointer to one.
    role_claim: String,
    keys: RwLock<Arc<Vec<Key>>>,
}

struct Key {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

impl Tokens {
    /// # Errors
    /// Naming the file, and what is wrong with it.
    pub(crate) fn new(
        source: &Source,
        issuer: Option<&str>,
        audience: Option<&str>,
        role_claim: &str,
    ) -> anyhow::Result<Self> {
        let keys = match source {
            Source::Secret(secret) => vec![secret_key(secret)?],
            Source::Pem(path) => {
                vec![pem_key(&read(path)?).with_context(|| format!("JWT_KEY_FILE={}", path.display()))?]
            }
            Source::Jwks(path) => {
                jwks_keys(&read(path)?).with_context(|| format!("JWT_JWKS_FILE={}", path.display()))?
            }
        };
        let mut validation = Validation { leeway: LEEWAY.as_secs(), validate_nbf: true, ..Validation::default() };
        // A token that is for others is refused even where nobody said whom ours are for.
        if let Some(audience) = audience {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".to_owned());
        }
        if let Some(issuer) = issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        Ok(Self { validation, role_claim: role_claim.to_owned(), keys: RwLock::new(Arc::new(keys)) })
    }

    /// The claims of a token that one of the keys has signed and that is good now.
    pub(crate) fn verify(&self, token: &str) -> Result<Claims, &'static str> {
        let header = decode_header(token)
            .map_err(|_| "the token is no signed JWT, or of an algorithm that is not known here")?;
        // Something that must be understood (RFC 7515, section 4.1.11), and we understand no such thing.
        if header.crit.is_some() {
            return Err("the token asks for an extension that is not known here (crit)");
        }
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        let mut refusal = "no key here has signed the token";
        let may_have_signed = |key: &&Key| {
            let is_named = header.kid.is_none() || key.id.is_none() || header.kid == key.id;
            is_named && key.algorithms.contains(&header.alg)
        };
        for key in keys.iter().filter(may_have_signed) {
            let validation = Validation { algorithms: vec![header.alg], ..self.validation.clone() };
            match decode::<Value>(token, &key.key, &validation) {
                Ok(token) => return self.claims(&token.claims),
                Err(error) => match reason(error.kind()) {
                    Some(reason) => return Err(reason),
                    None => refusal = "the token's signature is not good",
                },
            }
        }
        Err(refusal)
    }

    /// `sub` is text; a whole number is as good, as everywhere. The roles are a text or a list of texts:
    /// Keycloak and Entra ID give lists.
    fn claims(&self, claims: &Value) -> Result<Claims, &'static str> {
        let sub = match &claims["sub"] {
            Value::String(sub) => sub.clone(),
            Value::Number(sub) if sub.is_i64() || sub.is_u64() => sub.to_string(),
            _ => return Err("the token does not say whose it is (sub)"),
        };
        let found = match self.role_claim.starts_with('/') {
            true => claims.pointer(&self.role_claim),
            false => claims.get(&self.role_claim),
        };
        let roles = match found {
            Some(Value::String(role)) => vec![role.clone()],
            Some(Value::Array(roles)) => roles.iter().filter_map(Value::as_str).map(ToOwned::to_owned).collect(),
            _ => Vec::new(),
        };
        Ok(Claims { sub, roles })
    }

    /// Takes what the file says now, whenever that changes. What cannot be read changes nothing.
    pub(crate) async fn follow(&self, path: PathBuf, stop: CancellationToken) {
        let mut known = Vec::new();
        let mut was_bad = false;
        while stop.run_until_cancelled(tokio::time::sleep(RELOAD_INTERVAL)).await.is_some() {
            let found = match tokio::fs::read(&path).await {
                Ok(bytes) if bytes == known => continue,
                Ok(bytes) => {
                    known = bytes;
                    jwks_keys(&known)
                }
                Err(error) => Err(error.into()),
            };
            match found {
                Ok(keys) => {
                    *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
                    was_bad = false;
                }
                Err(error) => {
                    if !was_bad {
                        let error = format!("{error:#}");
                        tracing::warn!(error, path = %path.display(), "JWT_JWKS_FILE; the keys stay as they were");
                    }
                    was_bad = true;
                    known = Vec::new();
                }
            }
        }
    }
}

/// What is wrong with a token whose signature is good; `None` where it is not.
fn reason(kind: &ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::ExpiredSignature => "the token has expired",
        ErrorKind::ImmatureSignature => "the token is not good yet",
        ErrorKind::InvalidIssuer => "the token is of another issuer",
        ErrorKind::InvalidAudience => "the token is for another audience",
        ErrorKind::MissingRequiredClaim(claim) => match claim.as_str() {
            "exp" => "the token does not say when it expires (exp)",
            "iss" => "the token does not say who issued it (iss)",
            _ => "the token does not say whom it is for (aud)",
        },
        ErrorKind::InvalidSignature => return None,
        _ => "the token cannot be read",
    })
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("reading {}", path.display()))
}

fn secret_key(secret: &str) -> anyhow::Result<Key> {
    if secret.len() < SHORTEST_SECRET {
        bail!("JWT_SECRET is too short: HS256 wants {SHORTEST_SECRET} bytes or more");
    }
    Ok(Key { id: None, algorithms: vec![Algorithm::HS256], key: DecodingKey::from_secret(secret.as_bytes()) })
}

fn pem_key(pem: &[u8]) -> anyhow::Result<Key> {
    if contains(pem, b"PRIVATE KEY") {
        bail!("is a private key; the public one is wanted");
    }
    let key = DecodingKey::from_rsa_pem(pem)
        .or_else(|_| DecodingKey::from_ec_pem(pem))
        .or_else(|_| DecodingKey::from_ed_pem(pem))
        .context("is no public key in PEM (RSA, EC P-256 or P-384, Ed25519)")?;
    Ok(Key { id: None, algorithms: key.family().algorithms().to_vec(), key })
}

fn jwks_keys(json: &[u8]) -> anyhow::Result<Vec<Key>> {
    let set: JwkSet = serde_json::from_slice(unmarked(json)).context("is no JSON Web Key Set (RFC 7517)")?;
    let keys: Vec<Key> = set.keys.iter().filter_map(jwk_key).collect();
    if keys.is_empty() {
        bail!("has no key that signatures can be checked with");
    }
    Ok(keys)
}

/// `None`: a key of a kind that we do not know, or for something else. Sets may have such.
fn jwk_key(jwk: &Jwk) -> Option<Key> {
    if matches!(jwk.common.public_key_use, Some(PublicKeyUse::Encryption)) {
        return None;
    }
    let key = DecodingKey::from_jwk(jwk).ok()?;
    // A set holds public keys: one of HMAC in it would be a secret that everybody knows.
    if key.family() == AlgorithmFamily::Hmac {
        return None;
    }
    let algorithms = match jwk.common.key_algorithm {
        Some(algorithm) => vec![algorithm.try_into().ok()?],
        None => key.family().algorithms().to_vec(),
    };
    Some(Key { id: jwk.common.key_id.clone(), algorithms, key })
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn claims(role_claim: &str, claims: &Value) -> Result<Claims, &'static str> {
        let secret = Source::Secret("a secret of at least thirty-two bytes".into());
        Tokens::new(&secret, None, None, role_claim).unwrap().claims(claims)
    }

    #[test]
    fn roles_are_a_text_or_a_list_where_the_setting_says() {
        let keycloak = json!({ "sub": "u", "realm_access": { "roles": ["offline_access", "service"] } });
        let entra = json!({ "sub": "u", "roles": ["service"] });
        let auth0 = json!({ "sub": "u", "https://shop.example/role": "admin" });
        for (claim, given, roles) in [
            ("role", json!({ "sub": "u", "role": "service" }), &["service"][..]),
            ("role", json!({ "sub": "u", "role": ["a", "service", 7, null] }), &["a", "service"]),
            ("role", json!({ "sub": "u", "role": [] }), &[]),
            ("role", json!({ "sub": "u", "role": { "service": true } }), &[]),
            ("role", json!({ "sub": "u", "role": null }), &[]),
            ("role", keycloak.clone(), &[]),
            ("/realm_access/roles", keycloak, &["offline_access", "service"]),
            ("roles", entra, &["service"]),
            ("https://shop.example/role", auth0, &["admin"]),
        ] {
            assert_eq!(claims(claim, &given).unwrap().roles, roles, "{claim} of {given}");
        }
    }

    #[test]
    fn a_user_is_a_text_or_a_whole_number() {
        let sub = |sub: Value| claims("role", &json!({ "sub": sub })).map(|claims| claims.sub);
        assert_eq!(sub(json!("u")).as_deref(), Ok("u"));
        assert_eq!(sub(json!(42)).as_deref(), Ok("42"));
        for none in [json!(null), json!(1.5), json!(["u"]), json!({}), json!(true)] {
            assert!(sub(none).is_err_and(|said| said.contains("(sub)")));
        }
    }
}
