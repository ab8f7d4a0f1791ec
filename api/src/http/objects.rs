//! Objects are objects: a parser that takes a list for none of them.
//!
//! Serde's derived types take a list of their fields' values, too, which no
//! document tells of and no client means. [`Objects`] stands around a parser of a
//! format that knows its own types, as JSON does, and asks it for a map wherever a
//! type wants a struct, however deep.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

/// A parser, or a part of one, that takes no list for an object.
pub(super) struct Objects<T>(pub T);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Objects<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_any(Objects(visitor))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(Objects(visitor))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_option(Objects(visitor))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_newtype_struct(name, Objects(visitor))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_enum(name, variants, Objects(visitor))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_ignored_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map identifier
    }
}

macro_rules! visit_as_it_is {
    ($($method:ident: $type:ty,)*) => {
        $(fn $method<E: serde::de::Error>(self, value: $type) -> Result<V::Value, E> {
            self.0.$method(value)
        })*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Objects<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    visit_as_it_is! {
        visit_bool: bool,
        visit_i64: i64,
        visit_u64: u64,
        visit_f64: f64,
        visit_str: &str,
        visit_borrowed_str: &'de str,
        visit_string: String,
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit()
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_none()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(Objects(inner))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.0.visit_newtype_struct(Objects(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Objects(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Objects(entries))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.0.visit_enum(Objects(variant))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Objects<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, inner: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Objects(inner))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Objects<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_element_seed(Objects(seed))
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Objects<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        self.0.next_key_seed(seed)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.0.next_value_seed(Objects(seed))
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Objects<A> {
    type Error = A::Error;
    type Variant = Objects<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let (value, variant) = self.0.variant_seed(seed)?;
        Ok((value, Objects(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Objects<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.0.newtype_variant_seed(Objects(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(len, Objects(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, Objects(visitor))
    }
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;

    use super::*;
    use crate::wire::{
        DeviceNode, DiskConfig, PayloadConfig, RateLimiterConfig, VirtioConfig, VmConfig,
        VmConsole, VmResize,
    };

    fn read<T: DeserializeOwned>(text: &str) -> Result<T, String> {
        T::deserialize(Objects(&mut serde_json::Deserializer::from_str(text)))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_is_no_object_at_any_depth() {
        assert!(read::<PayloadConfig>("[null,null]").is_err());
        assert!(read::<VmResize>("[]").is_err());
        for text in [
            r#"{"payload":[null,null]}"#,
            r#"{"cpus":[1,1]}"#,
            r#"{"disks":[[null]]}"#,
            r#"{"disks":[{"rate_limiter_config":[null,null]}]}"#,
            r#"{"disks":[{"rate_limiter_config":{"ops":[1,null,1]}}]}"#,
            r#"{"rate_limit_groups":[["g",{}]]}"#,
        ] {
            let refused = read::<VmConfig>(text).unwrap_err();
            assert!(refused.contains("invalid type: sequence"), "{refused}");
            assert!(serde_json::from_str::<VmConfig>(text).is_ok(), "{text}");
        }
    }

    /// That `text` is read as by the parser alone.
    fn same<T: DeserializeOwned + PartialEq + fmt::Debug>(text: &str) {
        let alone = serde_json::from_str::<T>(text).map_err(|error| error.to_string());
        assert_eq!(read::<T>(text), alone, "{text}");
    }

    #[test]
    fn everything_else_is_read_as_before_with_the_same_words_for_what_is_wrong() {
        for text in [
            r#"{}"#,
            r#"{"payload":{"kernel":"/k"},"disks":[{"path":"/a","queue_affinity":[
                {"queue_index":1,"host_cpus":[1,2]}],"image_type":"Qcow2"}],"pmem":[{"a":[1]}],
                "platform":{"uuid":"u","oem_strings":["a"]},"rtc":null,"x":[[]]}"#,
            r#"{"payload":{},"memory":{}}"#,
            r#"{"memory":{"size":-1}}"#,
            r#"{"memory":{"size":1.5}}"#,
            r#"{"memory":{"size":"1"}}"#,
            r#"{"memory":{"size":18446744073709551616}}"#,
            r#"{"cpus":{"boot_vcpus":4294967296,"max_vcpus":1}}"#,
            r#"{"serial":{"mode":"tty"}}"#,
            r#"{"serial":{"mode":7}}"#,
            r#"{"pvpanic":null}"#,
            r#"{"payload":7}"#,
            r#"{"payload""#,
            "",
        ] {
            same::<VmConfig>(text);
        }
        same::<DiskConfig>(r#"{"path":"\u00e9\n","num_queues":3}"#);
        same::<RateLimiterConfig>(r#"{"x":1}"#);
        same::<VmConsole>(r#"{"add":"file=x"}"#);
        same::<VmConsole>(r#"{"x":"y"}"#);
        same::<VmConsole>(r#""add""#);
        same::<VirtioConfig>(r#"{"kind":"blk","config":{"path":"/a","n":[1,{"m":null}]}}"#);
        same::<DeviceNode>(
            r#"{"id":"a","resources":[{"LegacyIrq":4},{"PioAddressRange":{"base":1,"size":2}}],
                "children":[]}"#,
        );
    }
}
