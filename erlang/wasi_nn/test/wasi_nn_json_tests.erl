-module(wasi_nn_json_tests).

-include_lib("eunit/include/eunit.hrl").

-define(N_RANDOM, 300).

round_trip_test() ->
    _ = rand:seed(exsss, {1, 2, 3}),
    _ = [
        begin
            Term = random_term(4),
            {ok, Text} = wasi_nn_json:encode(Term),
            ?assertEqual({ok, Term}, wasi_nn_json:decode(Text))
        end
     || _ <- lists:seq(1, ?N_RANDOM)
    ].

random_term(0) ->
    lists:nth(rand:uniform(6), [true, false, null, rand:uniform(1000) - 500, rand:normal() * 1.0e10, random_text()]);
random_term(Depth) ->
    N = rand:uniform(4) - 1,
    case rand:uniform(3) of
        1 -> [random_term(Depth - 1) || _ <- lists:seq(1, N)];
        2 -> maps:from_list([{random_text(), random_term(Depth - 1)} || _ <- lists:seq(1, N)]);
        3 -> random_term(0)
    end.

random_text() ->
    Characters = [0, 1, $\n, $", $\\, $/, $a, 127, 16#E4, 16#20AC, 16#1F600],
    unicode:characters_to_binary([lists:nth(rand:uniform(length(Characters)), Characters) || _ <- lists:seq(1, 6)]).

%% Whatever comes in, it is a term or an error.
garbage_test() ->
    {ok, Whole} = wasi_nn_json:encode(#{a => [1, 2.5, <<"x\"y">>, null, #{}], b => #{c => -3}}),
    _ = [?assertEqual(error, wasi_nn_json:decode(binary:part(Whole, 0, N))) || N <- lists:seq(0, byte_size(Whole) - 1)],
    Bad = [
        "01", "1.", ".5", "+1", "1e", "- 1", "nul", "[1,]", "[1 2]", "{\"a\"}", "{\"a\":1,}", "{a:1}", "\"\\x\"",
        "\"\\u12\"", "\"\\u12g4\"", "\"\n\"", "\"open", "1 2", "", " ", "1e999", [255]
    ],
    _ = [?assertEqual({Text, error}, {Text, wasi_nn_json:decode(list_to_binary(Text))}) || Text <- Bad].

numbers_test() ->
    Numbers = [{"0", 0}, {"-0", 0}, {"12", 12}, {"1.5", 1.5}, {"-2e3", -2000.0}, {"1.5E-1", 0.15}, {" 7 ", 7}],
    _ = [?assertEqual({ok, Value}, wasi_nn_json:decode(list_to_binary(Text))) || {Text, Value} <- Numbers].

escapes_test() ->
    Texts = [
        {"\"\\u00e4\\n\\/\"", <<"ä\n/"/utf8>>},
        {"\"\\ud83d\\ude00\"", <<16#1F600/utf8>>},
        {"\"\\ud83d\"", <<16#FFFD/utf8>>},
        {"\"\\ud83d\\u0041\"", <<16#FFFD/utf8, "A">>}
    ],
    _ = [?assertEqual({ok, Value}, wasi_nn_json:decode(list_to_binary(Text))) || {Text, Value} <- Texts].

atoms_test() ->
    ?assertEqual({ok, <<"{\"a\":[\"b\",true,null,null]}">>}, wasi_nn_json:encode(#{a => [b, true, null, undefined]})).

not_json_test() ->
    Wrong = [{a, b}, self(), make_ref(), [a | b], <<255>>, #{1 => 2}, #{{} => 1}, fun() -> ok end, <<1:3>>],
    _ = [?assertEqual({Term, error}, {Term, wasi_nn_json:encode(Term)}) || Term <- Wrong].

no_atom_is_made_test() ->
    {ok, _} = wasi_nn_json:decode(<<"{\"warm\": 1}">>),
    Before = erlang:system_info(atom_count),
    Text = <<"{\"never_", "heard_of_this\": \"nor_of_", "this\"}">>,
    {ok, _} = wasi_nn_json:decode(Text),
    ?assertEqual(Before, erlang:system_info(atom_count)).
