package main

import (
	"math"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"
)

// parse returns the settings that an environment and a command line give.
func parse(t *testing.T, environment map[string]string, args ...string) (*settings, error) {
	t.Helper()
	s := &settings{}
	flags := pflag.NewFlagSet("run", pflag.ContinueOnError)
	s.register(flags)
	bindEnvironment(flags)
	require.NoError(t, flags.Parse(args))
	if err := applyEnvironment(flags, func(name string) string { return environment[name] }); err != nil {
		return nil, err
	}
	return s, s.validate()
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	s, err := parse(t, map[string]string{"NODE_NAME": "worker-1"})
	require.NoError(t, err)
	require.Equal(t, &settings{
		limits:            limits{targetSecretNames: list{"imps-pull-secret"}, sourceNamespaces: list{"registry-access"}},
		duties:            list{"node"},
		nodeName:          "worker-1",
		namespace:         "imps-system",
		renderedNamespace: "imps-rendered",
		demandLinger:      time.Minute,
		process:           process{metricsAddr: "127.0.0.1:9464", healthAddr: ":9465", logLevel: "info", logFormat: "json"},
	}, s)
}

func TestWhereSettingsComeFrom(t *testing.T) {
	t.Parallel()
	type environment map[string]string
	get := map[string]func(*settings) string{
		"namespace": func(s *settings) string { return s.namespace },
		"targets":   func(s *settings) string { return s.targetSecretNames.String() },
		"excluded":  func(s *settings) string { return s.excludedNamespaces.String() },
		"duties":    func(s *settings) string { return s.duties.String() },
		"level":     func(s *settings) string { return s.logLevel },
		"format":    func(s *settings) string { return s.logFormat },
		"node":      func(s *settings) string { return s.nodeName },
		"metrics":   func(s *settings) string { return s.metricsAddr },
	}
	tests := map[string]struct {
		environment environment
		args        []string
		setting     string
		want        string
	}{
		"a flag beats the environment": {
			environment{"IMPS_NAMESPACE": "b", "POD_NAMESPACE": "c"}, []string{"--namespace=a"}, "namespace", "a",
		},
		"a flag beats the environment also with the default's value": {
			environment{"IMPS_NAMESPACE": "b"}, []string{"--namespace=imps-system"}, "namespace", "imps-system",
		},
		"imps's own variable beats the common one": {
			environment{"IMPS_NAMESPACE": "b", "POD_NAMESPACE": "c"}, nil, "namespace", "b",
		},
		"the common variable beats the default": {
			environment{"POD_NAMESPACE": "c"}, nil, "namespace", "c",
		},
		"the node's name from the common variable":        {environment{"NODE_NAME": "n-1"}, []string{"--duties=node"}, "node", "n-1"},
		"the node's name from imps's own variable":        {environment{"NODE_NAME": "n-1", "IMPS_NODE_NAME": "n-2"}, nil, "node", "n-2"},
		"the level from the common variable":              {environment{"LOG_LEVEL": "debug"}, nil, "level", "debug"},
		"the level in any case":                           {environment{"LOG_LEVEL": "WARN"}, nil, "level", "warn"},
		"the format from the common variable":             {environment{"LOG_FORMAT": "text"}, nil, "format", "text"},
		"logfmt is text":                                  {environment{"LOG_FORMAT": "logfmt"}, nil, "format", "text"},
		"an empty variable is none":                       {environment{"LOG_LEVEL": "", "IMPS_LOG_LEVEL": ""}, nil, "level", "info"},
		"a list replaces the default":                     {environment{"IMPS_TARGET_SECRET_NAMES": "a,b"}, nil, "targets", "a,b"},
		"elements are trimmed, and empty ones dropped":    {nil, []string{"--target-secret-names", " a ,, b,"}, "targets", "a,b"},
		"a list from a flag replaces the environment's":   {environment{"IMPS_EXCLUDED_NAMESPACES": "a"}, []string{"--excluded-namespaces=b"}, "excluded", "b"},
		"a list can be emptied":                           {environment{"IMPS_EXCLUDED_NAMESPACES": "a"}, []string{"--excluded-namespaces="}, "excluded", ""},
		"duties have one order, and each is there once":   {nil, []string{"--duties=cluster,node,cluster", "--node-name=a"}, "duties", "node,cluster"},
		"a server can be switched off by a flag":          {nil, []string{"--metrics-addr="}, "metrics", ""},
		"a server can be switched off by the environment": {environment{"IMPS_METRICS_ADDR": "0"}, nil, "metrics", "0"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"--duties=cluster"}, test.args...)
			s, err := parse(t, test.environment, args...)
			require.NoError(t, err)
			require.Equal(t, test.want, get[test.setting](s))
		})
	}
}

func TestWhatIsRefused(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		args []string
		want string
	}{
		"no duty":                        {[]string{"--duties=,"}, "--duties: no duty is left: use node, cluster, or node,cluster"},
		"a duty that is not there":       {[]string{"--duties=node,nodes"}, `--duties: "nodes" is not a duty`},
		"the node duty without a node":   {[]string{"--duties=node"}, "--node-name: the node duty needs the name of its node"},
		"a node name that cannot be":     {[]string{"--duties=node", "--node-name=a/b"}, `--node-name: "a/b" is not a valid name`},
		"a namespace that cannot be":     {[]string{"--namespace=A"}, `--namespace: "A" is not a valid name`},
		"an empty namespace":             {[]string{"--rendered-namespace="}, `--rendered-namespace: "" is not a valid name`},
		"one namespace for both":         {[]string{"--namespace=a", "--rendered-namespace=a"}, "--rendered-namespace: it must not be --namespace"},
		"sources among the rendered":     {[]string{"--source-namespaces=imps-rendered"}, "--rendered-namespace: it must not be one of --source-namespaces"},
		"no target name":                 {[]string{"--target-secret-names="}, "--target-secret-names: no name is left: give at least one, or * for any"},
		"any target name and one":        {[]string{"--target-secret-names=*,a"}, "--target-secret-names: * allows every name: give it alone, or leave it out"},
		"any source namespace and one":   {[]string{"--source-namespaces=a,*"}, "--source-namespaces: * allows every name: give it alone, or leave it out"},
		"a target name that cannot be":   {[]string{"--target-secret-names=a_b"}, `--target-secret-names: "a_b" is not a valid name`},
		"a glob as a source namespace":   {[]string{"--source-namespaces=team-*"}, `--source-namespaces: "team-*" is not a valid name`},
		"a bad glob":                     {[]string{"--excluded-namespaces=kube-["}, `--excluded-namespaces: excluded namespace "kube-[" is not a name or a glob`},
		"a negative rate":                {[]string{"--kube-api-qps=-1"}, "--kube-api-qps: -1 is no rate"},
		"no number as a rate":            {[]string{"--kube-api-qps=NaN"}, "--kube-api-qps: NaN is no rate"},
		"no linger":                      {[]string{"--demand-linger=0s"}, "--demand-linger: 0s is too short"},
		"an address without a port":      {[]string{"--metrics-addr=127.0.0.1"}, `--metrics-addr: "127.0.0.1" is not an address`},
		"a port that cannot be":          {[]string{"--health-addr=:70000"}, `--health-addr: ":70000" is not an address`},
		"a log level that is not there":  {[]string{"--log-level=trace"}, `--log-level: "trace" is not known: use debug, info, warn, error`},
		"a log format that is not there": {[]string{"--log-format=xml"}, `--log-format: "xml" is not known: use json, text`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parse(t, nil, append([]string{"--duties=cluster"}, test.args...)...)
			require.ErrorContains(t, err, test.want)
		})
	}
}

func TestWhatIsAllowed(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"any name":                 {"--target-secret-names=*", "--source-namespaces=*"},
		"no source Secrets at all": {"--source-namespaces="},
		"globs":                    {"--excluded-namespaces=kube-*,[a-c]x,exact"},
		"both servers off":         {"--metrics-addr=0", "--health-addr=0"},
		"any free port for both":   {"--metrics-addr=127.0.0.1:0", "--health-addr=:0"},
		"an IPv6 address":          {"--health-addr=[::1]:9465"},
		"a node name with dots":    {"--duties=node", "--node-name=ip-10-0-0-1.eu-central-1.compute.internal"},
		"a rate":                   {"--kube-api-qps=12.5"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parse(t, nil, append([]string{"--duties=cluster"}, args...)...)
			require.NoError(t, err)
		})
	}
}

func TestClientTellsWhoItIsAndKeepsToItsRate(t *testing.T) {
	t.Parallel()
	for rate, want := range map[float32][2]float64{0: {-1, 0}, 10: {10, 20}, 0.25: {0.25, 1}} {
		config := tune(&rest.Config{}, rate, "node,cluster")
		require.Equal(t, "imps-node/dev (node,cluster)", config.UserAgent)
		require.InDelta(t, want[0], config.QPS, math.SmallestNonzeroFloat32)
		require.EqualValues(t, want[1], config.Burst)
	}
}
