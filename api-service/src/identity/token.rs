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
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

/// How often a JWKS file is read again: so long a new key may be unknown, and an old one good.
const RELOAD_INTERVAL: Duration = Duration::from_secs(2);
/// Clocks differ.
const LEEWAY: Duration = Duration::from_secs(30);
/// RFC 7518, section 3.2: as long as the hash.
const SHORTEST_SECRET: usize = 32;

/// What is read from a token.
#[derive(Debug, Deserialize)]
pub(crate) struct Claims {
    pub sub: String,
    pub role: Option<String>,
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
    pub(crate) fn new(source: &Source, issuer: Option<&str>, audience: Option<&str>) -> anyhow::Result<Self> {
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
        validation.required_spec_claims.insert("sub".to_owned());
        // A token that is for others is refused even where nobody said whom ours are for.
        if let Some(audience) = audience {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".to_owned());
        }
        if let Some(issuer) = issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        Ok(Self { validation, keys: RwLock::new(Arc::new(keys)) })
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
            match decode::<Claims>(token, &key.key, &validation) {
                Ok(token) => return Ok(token.claims),
                Err(error) => match reason(error.kind()) {
                    Some(reason) => return Err(reason),
                    None => refusal = "the token's signature is not good",
                },
            }
        }
        Err(refusal)
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
            "sub" => "the token does not say whose it is (sub)",
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
    let set: JwkSet = serde_json::from_slice(json).context("is no JSON Web Key Set (RFC 7517)")?;
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
