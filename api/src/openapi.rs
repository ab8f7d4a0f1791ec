//! The OpenAPI 3.1 document of the socket, made from [`ROUTES`] and the types
//! of [`crate::wire`].
//!
//! It is in the repository as `resources/openapi/vireo.json`; a test compares
//! the two, and writes the file anew where `VIREO_WRITE_OPENAPI` is set.

use schemars::Schema;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::transform::{Transform, transform_subschemas};
use serde_json::{Map, Value, json};

use crate::routes::{BASE, Method, ROUTES, Route, Success};
use crate::wire;

/// The document as it is in the repository.
pub const DOCUMENT: &str = include_str!("../../resources/openapi/vireo.json");

/// The version of the interface. It grows when something is added, and its
/// first part when something is taken away.
const VERSION: &str = "1.0";

/// Makes the document.
#[must_use]
pub fn document() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
        settings.transforms.push(Box::new(Ranges));
    });
    let mut generator = settings.into_generator();
    let mut paths: Map<String, Value> = Map::new();
    for route in ROUTES {
        let path = format!("/{}", route.name);
        let operation = operation(route, &mut generator);
        let method = match route.method {
            Method::Get => "get",
            Method::Put => "put",
        };
        let known = paths.entry(path).or_insert_with(|| json!({}));
        if let Value::Object(known) = known {
            known.insert(method.to_owned(), operation);
        }
    }
    let mut schemas = generator.take_definitions(true);
    schemas.insert("Error".to_owned(), error_schema());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Vireo",
            "description": "The control socket of the Vireo virtual machine monitor: HTTP on a \
                            unix socket. What Cloud Hypervisor's v1 clients know is as they know \
                            it; the rest is marked as added.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "version": VERSION,
        },
        "servers": [{"url": format!("http://localhost{}", BASE.trim_end_matches('/'))}],
        "tags": [
            {"name": "v1", "description": "As in Cloud Hypervisor's v1 interface."},
            {"name": "added", "description": "Not in v1. Unknown fields are refused."},
        ],
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

fn error_schema() -> Value {
    json!({
        "description": "Why it was not done, the outermost cause first.",
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
    })
}

fn operation(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let tag = if route.added { "added" } else { "v1" };
    let id = format!("{:?}", route.endpoint);
    let mut operation = json!({
        "operationId": id,
        "summary": route.about,
        "tags": [tag],
        "responses": responses(route, generator),
    });
    let parameters = parameters(route);
    if let Value::Object(operation) = &mut operation {
        if !parameters.is_empty() {
            operation.insert("parameters".to_owned(), parameters.into());
        }
        if let Some(request) = route.request {
            let body = json!({
                "required": true,
                "content": content("application/json", request(generator)),
            });
            operation.insert("requestBody".to_owned(), body);
        }
    }
    operation
}

fn parameters(route: &Route) -> Vec<Value> {
    match route.success {
        Success::Text("text/event-stream") => vec![json!({
            "name": "Last-Event-ID",
            "in": "header",
            "description": "The last event that is known already.",
            "schema": {"type": "string", "pattern": "^[0-9]{1,20}$"},
        })],
        Success::Stream(_) => vec![json!({
            "name": "replay",
            "in": "query",
            "description": "1: what was written before comes first.",
            "schema": {"type": "string", "enum": ["0", "1"]},
        })],
        _ => Vec::new(),
    }
}

fn content(kind: &str, schema: Schema) -> Value {
    json!({ kind: {"schema": schema} })
}

fn responses(route: &Route, generator: &mut SchemaGenerator) -> Value {
    let mut responses = Map::new();
    let mut say = |code: &str, description: &str, content: Option<Value>| {
        let mut response = json!({ "description": description });
        if let (Value::Object(response), Some(content)) = (&mut response, content) {
            response.insert("content".to_owned(), content);
        }
        responses.insert(code.to_owned(), response);
    };
    const DONE: &str = "It has been done.";
    match route.success {
        Success::Nothing => say("204", DONE, None),
        Success::EmptyBody => say("200", DONE, None),
        Success::Object(schema) => {
            let body = content("application/json", schema(generator));
            say("200", "What was asked for.", Some(body));
        }
        Success::Placed => {
            let place = generator.subschema_for::<wire::PciDeviceInfo>();
            let body = content("application/json", place);
            say("200", "The device is in the machine.", Some(body));
            say(
                "204",
                "The device is in the description of a machine that is not booted.",
                None,
            );
        }
        Success::Text(kind) => {
            let body = content(kind, Schema::default());
            say("200", "What was asked for.", Some(body));
        }
        // In OpenAPI 3.1 a file is what has no schema.
        Success::File(kind) => say("200", "What was asked for.", Some(json!({ kind: {} }))),
        Success::Stream(protocol) => {
            let description = format!("The connection is a stream by the protocol {protocol}.");
            say("101", &description, None);
        }
        Success::DoneOrJob => {
            let job = generator.subschema_for::<wire::JobInfo>();
            let body = content("application/json", job);
            say("200", "It goes on as a job.", Some(body));
            say("204", DONE, None);
        }
    }
    for code in route.errors.iter().chain(&[500]) {
        let description = match code {
            400 => "The request makes no sense.",
            404 => "There is no such machine, device or job.",
            409 => "It makes no sense in this state, or something else has the name or the place.",
            429 => "Something like it is under way.",
            501 => "This monitor does not have it; the answer names what is missing.",
            _ => "It was tried and failed.",
        };
        let schema = Schema::new_ref("#/components/schemas/Error".to_owned());
        say(
            &code.to_string(),
            description,
            Some(content("application/json", schema)),
        );
    }
    Value::Object(responses)
}

/// Says of whole numbers how large they may be: a format alone is no bound.
#[derive(Clone, Debug)]
struct Ranges;

impl Transform for Ranges {
    fn transform(&mut self, schema: &mut Schema) {
        let most = match schema.get("format").and_then(Value::as_str) {
            Some("uint32") => Some(Value::from(u32::MAX)),
            Some("uint" | "uint64") => Some(Value::from(u64::MAX)),
            Some("int64") => Some(Value::from(i64::MAX)),
            Some("int32") => Some(Value::from(i32::MAX)),
            _ => None,
        };
        if let (Some(most), Some(object)) = (most, schema.as_object_mut()) {
            object.entry("maximum").or_insert(most);
        }
        transform_subschemas(self, schema);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const PATH: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../resources/openapi/vireo.json"
    );

    fn text() -> String {
        format!("{}\n", serde_json::to_string_pretty(&document()).unwrap())
    }

    #[test]
    fn the_document_in_the_repository_is_that_of_the_types() {
        if std::env::var_os("VIREO_WRITE_OPENAPI").is_some() {
            std::fs::write(PATH, text()).unwrap();
            return;
        }
        assert!(
            text() == DOCUMENT,
            "resources/openapi/vireo.json is not what the types say: run make openapi"
        );
    }

    /// Every `$ref` in the document.
    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(at)) = map.get("$ref") {
                    found.insert(at.clone());
                }
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_schema_is_referred_to() {
        let document = document();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        for reference in &found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        let schemas = document.pointer("/components/schemas").unwrap();
        for name in schemas.as_object().unwrap().keys() {
            let reference = format!("#/components/schemas/{name}");
            assert!(found.contains(&reference), "{name}");
        }
    }

    #[test]
    fn every_route_is_in_the_document() {
        let document = document();
        for route in ROUTES {
            let method = match route.method {
                Method::Get => "get",
                Method::Put => "put",
            };
            let operation = &document["paths"][format!("/{}", route.name)][method];
            assert_eq!(operation["summary"], route.about);
            assert_eq!(
                operation["requestBody"].is_object(),
                route.request.is_some()
            );
        }
    }

    #[test]
    fn added_requests_refuse_unknown_fields_and_the_others_do_not() {
        let document = document();
        let refuses = |name: &str| {
            let schema = &document["components"]["schemas"][name];
            assert!(schema.is_object(), "{name}");
            schema["additionalProperties"] == false
        };
        assert!(refuses("VmUpdateDisk") && refuses("VirtioConfig") && refuses("JobCancel"));
        assert!(!refuses("VmConfig") && !refuses("DiskConfig") && !refuses("VmResize"));
    }

    #[test]
    fn whole_numbers_have_bounds() {
        let document = document();
        let field = |at: &str| {
            document
                .pointer(&format!("/components/schemas/{at}"))
                .unwrap()
        };
        assert_eq!(
            field("MemoryConfig/properties/size/maximum"),
            &json!(u64::MAX)
        );
        assert_eq!(
            field("CpusConfig/properties/boot_vcpus/maximum"),
            &json!(u32::MAX)
        );
        assert_eq!(
            field("DiskConfig/properties/queue_size/maximum"),
            &json!(65535)
        );
    }
}
