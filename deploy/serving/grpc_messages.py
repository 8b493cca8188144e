"""The protocol's gRPC messages, as classes made from a table when gRPC is asked for.

Generated code would hold everybody to the protobuf release that it was generated for. Names and numbers are those of
the public proto (Triton's, which holds the Open Inference Protocol's and the repository calls); what this server never
reads or writes is left out, and protobuf passes over it. Two spellings differ and look the same in bytes: a map is a
list of pairs, and one of several is simply optional.
"""

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto  # type: ignore[import-untyped]
from google.protobuf.descriptor_pool import DescriptorPool  # type: ignore[import-untyped]
from google.protobuf.message_factory import GetMessageClass  # type: ignore[import-untyped]

INFERENCE = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "1 live bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "1 ready bool",
    "ModelReadyRequest": "1 name string, 2 version string",
    "ModelReadyResponse": "1 ready bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "1 name string, 2 version string, 3 extensions string*",
    "ModelMetadataRequest": "1 name string, 2 version string",
    "ModelMetadataResponse": "1 name string, 2 versions string*, 3 platform string, 4 inputs Port*, 5 outputs Port*",
    "Port": "1 name string, 2 datatype string, 3 shape int64*",
    "Value": "1 bool_param bool, 2 int64_param int64, 3 string_param string, 5 uint64_param uint64",
    "Parameter": "1 key string, 2 value Value",
    "Contents": "4 uint_contents uint32*, 8 bytes_contents bytes*",
    "ModelInferRequest": "1 model_name string, 2 model_version string, 3 id string, 4 parameters Parameter*, "
    "5 inputs Input*, 6 outputs Wanted*, 7 raw_input_contents bytes*",
    "Input": "1 name string, 2 datatype string, 3 shape int64*, 4 parameters Parameter*, 5 contents Contents",
    "Wanted": "1 name string, 2 parameters Parameter*",
    "ModelInferResponse": "1 model_name string, 2 model_version string, 3 id string, 5 outputs Port*, "
    "6 raw_output_contents bytes*",
    "ModelStreamInferResponse": "1 error_message string, 2 infer_response ModelInferResponse",
    "ModelConfigRequest": "1 name string, 2 version string",
    "ModelConfigResponse": "1 config ModelConfig",
    "ModelConfig": "1 name string, 2 platform string, 17 backend string, 4 max_batch_size int32, "
    "5 input ModelInput*, 6 output ModelOutput*",
    "ModelInput": "1 name string, 2 data_type int32, 4 dims int64*, 8 optional bool",
    "ModelOutput": "1 name string, 2 data_type int32, 3 dims int64*",
    "ModelStatisticsRequest": "1 name string, 2 version string",
    "ModelStatisticsResponse": "1 model_stats ModelStatistics*",
    "ModelStatistics": "1 name string, 2 version string, 3 last_inference uint64, 4 inference_count uint64, "
    "5 execution_count uint64, 6 inference_stats InferStatistics",
    "InferStatistics": "1 success Duration, 2 fail Duration, 3 queue Duration, 4 compute_input Duration, "
    "5 compute_infer Duration, 6 compute_output Duration, 7 cache_hit Duration, 8 cache_miss Duration",
    "Duration": "1 count uint64, 2 ns uint64",
    "RepositoryIndexRequest": "1 repository_name string, 2 ready bool",
    "RepositoryIndexResponse": "1 models ModelIndex*",
    "ModelIndex": "1 name string, 2 version string, 3 state string, 4 reason string",
    "RepositoryModelLoadRequest": "1 repository_name string, 2 model_name string",
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": "1 repository_name string, 2 model_name string",
    "RepositoryModelUnloadResponse": "",
}
HEALTH = {"HealthCheckRequest": "1 service string", "HealthCheckResponse": "1 status int32"}


def message_classes(package: str, messages: dict[str, str]) -> dict[str, Any]:
    """Protobuf's class of each message.

    Args:
        package: The proto's package.
        messages: Fields by message: number, name and type each, ``*`` for a list.
    """
    file = FileDescriptorProto(name=f"tanuki/{package}.proto", package=package, syntax="proto3")
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for field in filter(None, fields.split(", ")):
            number, label, kind = field.split()
            made = message.field.add(name=label, number=int(number), label=FieldDescriptorProto.LABEL_OPTIONAL)
            if kind.endswith("*"):
                made.label = FieldDescriptorProto.LABEL_REPEATED
            base = kind.rstrip("*")
            if base in messages:
                made.type, made.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{package}.{base}"
            else:
                made.type = FieldDescriptorProto.Type.Value(f"TYPE_{base.upper()}")
    pool = DescriptorPool()  # of our own: another library may have registered the same names
    pool.AddSerializedFile(file.SerializeToString())
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}
