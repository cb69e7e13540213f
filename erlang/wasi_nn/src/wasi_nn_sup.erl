%% @doc Keeps `wasi_nn_server' running. What native code does wrong is that server's to mend; it restarts the
%% process itself, with the models and sessions that it knows of.
-module(wasi_nn_sup).
-behaviour(supervisor).

-export([start_link/0, init/1]).

-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    case supervisor:start_link({local, ?MODULE}, ?MODULE, []) of
        {ok, Pid} -> {ok, Pid};
        ignore -> {error, ignore};
        {error, Reason} -> {error, Reason}
    end.

-spec init([]) -> {ok, {supervisor:sup_flags(), [supervisor:child_spec()]}}.
init([]) ->
    Server = #{
        id => wasi_nn_server,
        start => {wasi_nn_server, start_link, []},
        shutdown => 10000,
        modules => dynamic
    },
    {ok, {#{strategy => one_for_one, intensity => 5, period => 10}, [Server]}}.
