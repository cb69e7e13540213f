%% @doc The atoms for what went wrong. Names and numbers from the other side that are not in these tables are `unknown':
%% no atom is ever made from input.
-module(wasi_nn_code).

-export([from_name/1, from_number/1]).
-export_type([code/0]).

-type code() ::
    invalid_argument
    | invalid_encoding
    | missing_memory
    | busy
    | timeout
    | runtime_error
    | unsupported_operation
    | too_large
    | not_found
    | security
    | unknown
    | end_of_sequence
    | context_full
    | prompt_too_long
    | model_not_found
    %% The call was cancelled.
    | cancelled
    %% The other side was replaced while the call ran, or since the last one: try again.
    | restarted.

%% @doc The code of a name in a packet.
-spec from_name(binary()) -> code().
from_name(<<"invalid_argument">>) -> invalid_argument;
from_name(<<"invalid_encoding">>) -> invalid_encoding;
from_name(<<"missing_memory">>) -> missing_memory;
from_name(<<"busy">>) -> busy;
from_name(<<"timeout">>) -> timeout;
from_name(<<"runtime_error">>) -> runtime_error;
from_name(<<"unsupported_operation">>) -> unsupported_operation;
from_name(<<"too_large">>) -> too_large;
from_name(<<"not_found">>) -> not_found;
from_name(<<"security">>) -> security;
from_name(<<"end_of_sequence">>) -> end_of_sequence;
from_name(<<"context_full">>) -> context_full;
from_name(<<"prompt_too_long">>) -> prompt_too_long;
from_name(<<"model_not_found">>) -> model_not_found;
from_name(<<"cancelled">>) -> cancelled;
from_name(_Other) -> unknown.

%% @doc The code of a number in `wasi_nn_llama.h'.
-spec from_number(integer()) -> code().
from_number(1) -> invalid_argument;
from_number(2) -> invalid_encoding;
from_number(3) -> timeout;
from_number(4) -> runtime_error;
from_number(5) -> unsupported_operation;
from_number(6) -> too_large;
from_number(7) -> not_found;
from_number(8) -> security;
from_number(100) -> end_of_sequence;
from_number(101) -> context_full;
from_number(102) -> prompt_too_long;
from_number(103) -> model_not_found;
from_number(_Other) -> unknown.
