package cluster

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/rest"

	impsync "github.com/imps-node/imps/pkg/sync"
)

type gatherer = prometheus.Gatherer

func keys[K comparable, V any](m map[K]V) []K { return slices.Collect(maps.Keys(m)) }

func TestNewRefusesWhatCannotWork(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		edit func(*Config)
		says string
	}{
		"as it should be":           {func(*Config) {}, ""},
		"no namespace":              {func(c *Config) { c.Namespace = "" }, "needs the namespaces"},
		"no namespace to render to": {func(c *Config) { c.RenderedNamespace = "" }, "needs the namespaces"},
		"one namespace for both":    {func(c *Config) { c.RenderedNamespace = c.Namespace }, "a namespace of their own"},
		"no identity":               {func(c *Config) { c.Identity = "" }, "identity"},
		"no names":                  {func(c *Config) { c.TargetSecretNames = nil }, "--target-secret-names"},
		"a host that is none":       {func(c *Config) { c.Client = &rest.Config{Host: "http://a b"} }, "client"},
		"no certificate where it says": {func(c *Config) {
			c.Client = &rest.Config{TLSClientConfig: rest.TLSClientConfig{CAFile: "/does/not/exist"}}
		}, "connection to the API server"},
		"metrics that are there": {func(c *Config) {
			_, err := newMetrics(c.Registry)
			require.NoError(t, err)
		}, "metrics"},
	} {
		config := Config{
			Namespace: "a", RenderedNamespace: "b", Identity: "i", TargetSecretNames: []string{"pull"},
			Client: &rest.Config{Host: "http://127.0.0.1:1"}, Registry: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler),
		}
		test.edit(&config)
		c, err := New(config)
		if test.says == "" {
			require.NoError(t, err, name)
			require.Equal(t, DefaultDemandLinger, c.config.DemandLinger)
			require.Equal(t, DefaultReportLinger, c.config.ReportLinger)
			continue
		}
		require.ErrorContains(t, err, test.says, name)
	}
}

func TestAllowed(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		list []string
		name string
		want bool
	}{
		"listed":                         {[]string{"a", "b"}, "b", true},
		"not listed":                     {[]string{"a"}, "b", false},
		"nothing is listed":              {nil, "a", false},
		"any":                            {[]string{Any}, "a", true},
		"a star beside others is a name": {[]string{"a", Any}, "b", false},
		"no glob":                        {[]string{"a*"}, "ab", false},
	} {
		require.Equal(t, test.want, allowed(test.list, test.name), name)
	}
	c := &Coordinator{config: Config{TargetSecretNames: []string{"a", "b"}}}
	require.NoError(t, c.targetNameAllowed("a"))
	require.EqualError(t, c.targetNameAllowed("c"), `spec.target.secret.name "c" is not in --target-secret-names (a, b): add it to the chart's value targetSecretNames`)
	require.EqualError(t, c.sourceNamespaceAllowed("c"), `namespace "c" is not in --source-namespaces (): add it to the chart's value sourceNamespaces`)
}

func TestACoordinatorIsReadyWhileAnotherLeadsOrWhenItHasReadEverything(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newTestTerm(t).Coordinator
		require.Error(t, c.Ready())
		require.False(t, c.Leading())
		c.standby.Store(true)
		require.NoError(t, c.Ready())
		require.False(t, c.Leading())
		c.standby.Store(false)
		c.synced.Store(true)
		require.NoError(t, c.Ready())
		require.True(t, c.Leading())
	})
}

func TestACoordinatorWithoutAServerNeitherLeadsNorStandsByAndEndsWhenItIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		term := newTestTerm(t)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- term.Run(ctx) }()
		<-time.After(10 * time.Minute)
		require.Error(t, term.Ready())
		require.False(t, term.Leading())
		asked := term.server().asked()
		require.NotEmpty(t, asked)
		for _, request := range asked {
			require.Equal(t, "GET /apis/coordination.k8s.io/v1/namespaces/imps-system/leases/73de1ad9.banzaicloud.io", request, "nothing is read before it leads")
		}
		start := time.Now()
		cancel()
		require.NoError(t, <-done)
		require.Less(t, time.Since(start), impsync.Grace)
	})
}

func TestTheCauseOfATermsEnd(t *testing.T) {
	t.Parallel()
	live, ended := t.Context(), func() context.Context {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		return ctx
	}()
	require.Equal(t, "x", cause(ended, ended, errors.New("x")))
	require.Equal(t, "stopping", cause(ended, ended, nil))
	require.Equal(t, "the Lease could not be renewed", cause(live, ended, nil))
	require.Equal(t, "done", cause(live, live, nil))
}

func TestTheLeaseIsAcquiredOnceTheElectorSaysSo(t *testing.T) {
	t.Parallel()
	a := &acquisition{}
	require.False(t, a.Load())
	a.Eventf(nil, "Normal", "LeaderElection", "%s became leader", "x")
	require.True(t, a.Load())
}
