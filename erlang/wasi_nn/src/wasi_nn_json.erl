%% @doc JSON, for configuration on its way out and metadata on its way in. OTP has it from release 27 on only.
%%
%% Objects are maps with binaries as keys, arrays lists, strings binaries, and `null' is an atom.
-module(wasi_nn_json).

-export([encode/1, decode/1]).
-export_type([json/0, decoded/0]).

%% Keys and strings may be atoms, too; lists are arrays, never strings.
-type json() ::
    #{atom() | binary() => json()} | [json()] | binary() | number() | boolean() | null | atom().
-type decoded() :: #{binary() => decoded()} | [decoded()] | binary() | number() | boolean() | null.

%% @doc The text of a term. `error' for what has no place in JSON, such as a tuple, a process, or a binary that is not
%% UTF-8.
-spec encode(json()) -> {ok, binary()} | error.
encode(Term) ->
    try
        {ok, iolist_to_binary(value(Term))}
    catch
        throw:not_json -> error
    end.

value(Map) when is_map(Map) ->
    Members = [[string(key(Key)), $:, value(Value)] || {Key, Value} <- maps:to_list(Map)],
    [${, lists:join($,, Members), $}];
value(List) when is_list(List) ->
    %% length/1 refuses improper lists.
    try length(List) of
        _ -> [$[, lists:join($,, [value(Item) || Item <- List]), $]]
    catch
        error:badarg -> throw(not_json)
    end;
value(undefined) ->
    <<"null">>;
value(Atom) when Atom =:= true; Atom =:= false; Atom =:= null ->
    atom_to_binary(Atom);
value(Atom) when is_atom(Atom) ->
    string(atom_to_binary(Atom));
value(Integer) when is_integer(Integer) ->
    integer_to_binary(Integer);
value(Float) when is_float(Float) ->
    float_to_binary(Float, [short]);
value(Binary) when is_binary(Binary) ->
    string(Binary);
value(_Other) ->
    throw(not_json).

key(Atom) when is_atom(Atom) -> atom_to_binary(Atom);
key(Binary) when is_binary(Binary) -> Binary;
key(_Other) -> throw(not_json).

string(Binary) ->
    case unicode:characters_to_list(Binary) of
        Characters when is_list(Characters) ->
            [$", unicode:characters_to_binary([escape(C) || C <- Characters]), $"];
        _NotUtf8 ->
            throw(not_json)
    end.

escape($") -> "\\\"";
escape($\\) -> "\\\\";
escape(C) when C < 16#20; C =:= 16#7F -> io_lib:format("\\u~4.16.0b", [C]);
escape(C) -> C.

%% @doc The term of a text. `error' for what is not JSON.
-spec decode(binary()) -> {ok, decoded()} | error.
decode(Text) ->
    try
        {Term, Rest} = term(blank(Text)),
        case blank(Rest) of
            <<>> -> {ok, Term};
            _More -> error
        end
    catch
        throw:not_json -> error
    end.

term(<<${, Rest/binary>>) ->
    object(blank(Rest), #{});
term(<<$[, Rest/binary>>) ->
    array(blank(Rest), []);
term(<<$", Rest/binary>>) ->
    characters(Rest, []);
term(<<"true", Rest/binary>>) ->
    {true, Rest};
term(<<"false", Rest/binary>>) ->
    {false, Rest};
term(<<"null", Rest/binary>>) ->
    {null, Rest};
term(Text) ->
    number(Text).

object(<<$}, Rest/binary>>, Map) when map_size(Map) =:= 0 ->
    {Map, Rest};
object(<<$", Text/binary>>, Map) ->
    {Key, AfterKey} = characters(Text, []),
    case blank(AfterKey) of
        <<$:, AfterColon/binary>> ->
            {Value, AfterValue} = term(blank(AfterColon)),
            next_member(blank(AfterValue), Map#{Key => Value});
        _Other ->
            throw(not_json)
    end;
object(_Other, _Map) ->
    throw(not_json).

next_member(<<$}, Rest/binary>>, Map) -> {Map, Rest};
next_member(<<$,, Rest/binary>>, Map) -> object(blank(Rest), Map);
next_member(_Other, _Map) -> throw(not_json).

array(<<$], Rest/binary>>, []) ->
    {[], Rest};
array(Text, Items) ->
    {Item, AfterItem} = term(Text),
    case blank(AfterItem) of
        <<$], Rest/binary>> -> {lists:reverse(Items, [Item]), Rest};
        <<$,, Rest/binary>> -> array(blank(Rest), [Item | Items]);
        _Other -> throw(not_json)
    end.

characters(<<$", Rest/binary>>, Characters) ->
    {unicode:characters_to_binary(lists:reverse(Characters)), Rest};
characters(<<$\\, $u, Rest/binary>>, Characters) ->
    {Character, AfterEscape} = escaped(Rest),
    characters(AfterEscape, [Character | Characters]);
characters(<<$\\, C, Rest/binary>>, Characters) ->
    characters(Rest, [unescape(C) | Characters]);
characters(<<C/utf8, Rest/binary>>, Characters) when C >= 16#20 ->
    characters(Rest, [C | Characters]);
characters(_Other, _Characters) ->
    throw(not_json).

%% Characters beyond 16 bits are two escapes; half of such a pair becomes a replacement character.
escaped(Text) ->
    case hexadecimal(Text) of
        {High, <<$\\, $u, AfterHigh/binary>>} when High >= 16#D800, High < 16#DC00 ->
            case hexadecimal(AfterHigh) of
                {Low, Rest} when Low >= 16#DC00, Low < 16#E000 ->
                    {16#10000 + (High - 16#D800) * 16#400 + (Low - 16#DC00), Rest};
                _Other ->
                    {16#FFFD, <<$\\, $u, AfterHigh/binary>>}
            end;
        {Half, Rest} when Half >= 16#D800, Half < 16#E000 ->
            {16#FFFD, Rest};
        {Character, Rest} ->
            {Character, Rest}
    end.

hexadecimal(<<Digits:4/binary, Rest/binary>>) ->
    try
        {binary_to_integer(Digits, 16), Rest}
    catch
        error:badarg -> throw(not_json)
    end;
hexadecimal(_Other) ->
    throw(not_json).

unescape($") -> $";
unescape($\\) -> $\\;
unescape($/) -> $/;
unescape($b) -> $\b;
unescape($f) -> $\f;
unescape($n) -> $\n;
unescape($r) -> $\r;
unescape($t) -> $\t;
unescape(_Other) -> throw(not_json).

number(Text) ->
    case re:run(Text, "^-?(?:0|[1-9][0-9]*)(\\.[0-9]+)?([eE][-+]?[0-9]+)?", [{capture, all, binary}]) of
        {match, [Whole]} -> {binary_to_integer(Whole), rest(Text, Whole)};
        {match, [Whole, _Fraction]} -> {to_float(Whole), rest(Text, Whole)};
        {match, [Whole, <<>>, Exponent]} -> {with_fraction(Whole, Exponent), rest(Text, Whole)};
        {match, [Whole, _Fraction, _Exponent]} -> {to_float(Whole), rest(Text, Whole)};
        nomatch -> throw(not_json)
    end.

rest(Text, Taken) ->
    binary:part(Text, byte_size(Taken), byte_size(Text) - byte_size(Taken)).

%% Erlang's floats need a fraction.
with_fraction(Whole, Exponent) ->
    Digits = binary:part(Whole, 0, byte_size(Whole) - byte_size(Exponent)),
    to_float(<<Digits/binary, ".0", Exponent/binary>>).

to_float(Text) ->
    try
        binary_to_float(Text)
    catch
        error:badarg -> throw(not_json)
    end.

blank(<<C, Rest/binary>>) when C =:= $\s; C =:= $\n; C =:= $\r; C =:= $\t -> blank(Rest);
blank(Text) -> Text.
