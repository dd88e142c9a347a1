package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	authenticationv1client "k8s.io/client-go/kubernetes/typed/authentication/v1"
	"k8s.io/client-go/rest"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/pkg/sync/cluster"
	"github.com/imps-node/imps/pkg/sync/node"
)

func newRunCommand(getenv func(string) string) *cobra.Command {
	s := &settings{}
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the duties of a node, of the cluster, or both",
		Long: `run does its duties until SIGTERM or SIGINT; then it finishes within 5 s what is in flight.

  node     on every node: gives waiting Pods of the node their Secret where there is none, and reports
           which namespaces the Pods of the node select
  cluster  elected among all that have the duty: reads the ImagePullSecrets and their sources, and
           delivers, repairs and prunes the Secrets of all namespaces

Every flag can also be set by the environment, by the variables in brackets. The command line wins over
the environment, and the environment over the default.`,
		Example: `  # The agent of a node, as a Pod of a DaemonSet
  NODE_NAME=worker-1 imps-node run

  # The coordinator; resources may use two target names, and never select the cluster's own namespaces
  imps-node run --duties=cluster --target-secret-names=imps-pull-secret,legacy-pull --excluded-namespaces='kube-*'

  # Both in one process, from outside the cluster, for people to read
  imps-node run --duties=node,cluster --node-name=kind-worker --kubeconfig="$HOME/.kube/config" --log-format=text`,
		Args: noArguments,
		RunE: checked(getenv, s.validate, s.run),
	}
	s.register(cmd.Flags())
	bindEnvironment(cmd.Flags())
	completeValues(cmd, "duties", dutyNode, dutyCluster, dutyNode+","+dutyCluster)
	completeValues(cmd, "log-level", levels()...)
	completeValues(cmd, "log-format", formatJSON, formatText)
	return cmd
}

// run wires everything up and runs it until the command's context ends.
func (s *settings) run(cmd *cobra.Command) error {
	log := s.log(cmd)
	client, err := runClient(s.kubeconfig, s.kubeAPIQPS, s.duties.String())
	if err != nil {
		return err
	}
	registry := newRegistry()
	instrumentClientGo(registry)
	duties, err := newDuties(s, client, registry, log)
	if err != nil {
		return err
	}
	return s.serve(cmd.Context(), duties, registry, log, "duties", s.duties.String(), "nodeName", s.nodeName,
		"namespace", s.namespace, "renderedNamespace", s.renderedNamespace,
		"apiServer", client.Host[strings.LastIndexByte(client.Host, '@')+1:], "kubeApiQps", s.kubeAPIQPS, "demandLinger", s.demandLinger.String(),
		"targetSecretNames", s.targetSecretNames.String(), "sourceNamespaces", s.sourceNamespaces.String(),
		"excludedNamespaces", s.excludedNamespaces.String(), "allowRescue", s.allowRescue, "nodeCacheDir", s.nodeCacheDir)
}

// log returns the log of a process, which client-go's goes to as well.
func (p *process) log(cmd *cobra.Command) *slog.Logger {
	log := newLogger(cmd.ErrOrStderr(), p.logLevel, p.logFormat)
	takeOverLogs(log, p.logLevel)
	return log
}

// serve does duties, and serves their metrics and health, until ctx ends. What it begins with is logged.
func (p *process) serve(ctx context.Context, duties []duty, registry *prometheus.Registry, log *slog.Logger, about ...any) error {
	metrics, err := listen(ctx, p.metricsAddr, metricsHandler(registry), log)
	if err != nil {
		return fmt.Errorf("--metrics-addr: %w", err)
	}
	health, err := listen(ctx, p.healthAddr, healthHandler(duties), log)
	if err != nil {
		return fmt.Errorf("--health-addr: %w", err)
	}
	log.Info("starting", slices.Concat([]any{"version", version}, about, []any{
		"metricsAddr", metrics.address(), "healthAddr", health.address(), "logLevel", p.logLevel, "logFormat", p.logFormat,
	})...)
	if err := serve(ctx, duties, metrics, health); err != nil {
		log.Error("stopping after an error", "error", err)
		return errReported
	}
	log.Info("stopped")
	return nil
}

// newDuties returns the duties that the settings name.
func newDuties(s *settings, client *rest.Config, registry *prometheus.Registry, log *slog.Logger) ([]duty, error) {
	metrics := impsync.NewMetrics(registry)
	var duties []duty
	if slices.Contains(s.duties, dutyNode) {
		agent, err := node.New(node.Config{
			NodeName: s.nodeName, Namespace: s.namespace, RenderedNamespace: s.renderedNamespace,
			Excluded: impsync.Exclusion(s.excludedNamespaces),
			CacheDir: s.nodeCacheDir,
			Client:   client, Metrics: metrics, Registry: registry, Log: log,
		})
		if err != nil {
			return nil, err
		}
		authentication, err := authenticationv1client.NewForConfig(client)
		if err != nil {
			return nil, fmt.Errorf("client: %w", err)
		}
		duties = append(duties, &boundDuty{duty: agent, node: s.nodeName, claim: claimOf(authentication.SelfSubjectReviews()), log: log})
	}
	if slices.Contains(s.duties, dutyCluster) {
		hostname, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("name of this machine, for the Lease: %w", err)
		}
		var coordinator *cluster.Coordinator
		tokens, err := newTokens(func(id string) { coordinator.TokenChanged(id) }, registry, log.With("duty", dutyCluster))
		if err != nil {
			return nil, err
		}
		coordinator, err = cluster.New(cluster.Config{
			Namespace: s.namespace, RenderedNamespace: s.renderedNamespace,
			TargetSecretNames: s.targetSecretNames, SourceNamespaces: s.sourceNamespaces,
			Excluded:     impsync.Exclusion(s.excludedNamespaces),
			AllowRescue:  s.allowRescue,
			Identity:     hostname + "_" + strings.ToLower(rand.Text()),
			DemandLinger: s.demandLinger,
			ECRSources:   ecrSources{}, Tokens: tokens,
			Client: client, Metrics: metrics, Registry: registry, Log: log,
		})
		if err != nil {
			return nil, err
		}
		duties = append(duties, coordinator, tokens)
	}
	return duties, nil
}

// serve runs the duties until ctx ends, and the servers as long as the duties run. An
// error of one ends them all.
func serve(ctx context.Context, duties []duty, servers ...*server) error {
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	tasks := []func(context.Context) error{func(serving context.Context) error {
		defer stop()
		working, cancel := context.WithCancel(serving)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		var work []func(context.Context) error
		for _, d := range duties {
			work = append(work, d.Run)
		}
		return impsync.RunTasks(working, work...)
	}}
	for _, s := range servers {
		tasks = append(tasks, s.run)
	}
	return impsync.RunTasks(serving, tasks...)
}
