package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"

	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/pkg/sync/cluster"
)

// refreshFlags are the flags of refresh.
type refreshFlags struct {
	process
	sources secretNames
	target  secretNames
	// interval is banzaicloud/imps's flag.
	interval int
}

// secretNames is the value of a flag that takes the name of a Secret, as namespace.name, and may be repeated.
type secretNames []types.NamespacedName

func (s *secretNames) String() string {
	var names []string
	for _, name := range *s {
		names = append(names, name.Namespace+"."+name.Name)
	}
	return strings.Join(names, ",")
}

func (*secretNames) Type() string { return "namespace.name" }

func (s *secretNames) Set(value string) error {
	for element := range strings.SplitSeq(value, ",") {
		// A namespace has no dot; the name of a Secret may have some.
		namespace, name, ok := strings.Cut(strings.TrimSpace(element), ".")
		if !ok || len(validation.IsDNS1123Label(namespace)) > 0 || len(validation.IsDNS1123Subdomain(name)) > 0 {
			return fmt.Errorf("%q is not the name of a Secret: use namespace.name", element)
		}
		*s = append(*s, types.NamespacedName{Namespace: namespace, Name: name})
	}
	return nil
}

func newRefreshCommand(getenv func(string) string) *cobra.Command {
	f := &refreshFlags{}
	cmd := &cobra.Command{
		Use:   "refresh --source-secret NAMESPACE.NAME --target-secret NAMESPACE.NAME",
		Short: "Keep one Secret the merge of others, without any resource",
		Long: `refresh keeps one pull Secret the merge of others until SIGTERM or SIGINT: docker configs, and
Secrets with AWS keys (type banzaicloud.io/aws-ecr-login-config), whose ECR tokens it renews at half of
their life. For one registry the last source that is listed wins. A source that fails keeps its last
good credentials in use; one that is deleted gives none.

It needs no ImagePullSecret, no CRD and no cluster-wide right, only get, list and watch of the sources,
and these with create and patch of the target. It is banzaicloud/imps's refresher: whatever stands in
the target, which you name, is replaced. Run it once: two would fight about the tokens.`,
		Example: `  imps-node refresh --source-secret=team-a.hub --source-secret=team-a.ecr --target-secret=team-a.pull`,
		Args:    noArguments,
		RunE:    checked(getenv, f.validate, f.run),
	}
	f.register(cmd.Flags())
	bindEnvironment(cmd.Flags())
	completeValues(cmd, "log-level", levels()...)
	completeValues(cmd, "log-format", formatJSON, formatText)
	return cmd
}

func (f *refreshFlags) register(flags *pflag.FlagSet) {
	flags.SortFlags = false
	flags.Var(&f.sources, "source-secret", "`namespace.name` of a source; give it again for each, the last listed wins")
	flags.Var(&f.target, "target-secret", "`namespace.name` of the Secret that is kept")
	f.process.register(flags)
	flags.IntVar(&f.interval, "periodic-reconcile-interval", 0, "has no effect: changes are watched for")
	_ = flags.MarkHidden("periodic-reconcile-interval") // it fails only for a flag that is not there
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		return pflag.NormalizedName(strings.ReplaceAll(name, "log.level", "log-level")) // banzaicloud/imps's word for it
	})
}

func (f *refreshFlags) validate() error {
	errs := []error{f.process.validate()}
	if len(f.sources) == 0 {
		errs = append(errs, errors.New("--source-secret: give at least one, as namespace.name"))
	}
	if len(f.target) != 1 {
		errs = append(errs, errors.New("--target-secret: give exactly one, as namespace.name"))
	}
	for _, source := range f.sources {
		if len(f.target) == 1 && source == f.target[0] {
			errs = append(errs, errors.New("--target-secret: it must not be one of the sources"))
		}
	}
	return errors.Join(errs...)
}

func (f *refreshFlags) run(cmd *cobra.Command) error {
	log := f.log(cmd)
	client, err := runClient(f.kubeconfig, 0, "refresh")
	if err != nil {
		return err
	}
	registry := newRegistry()
	instrumentClientGo(registry)
	var refresher *cluster.Refresher
	tokens, err := newTokens(func(id string) { refresher.TokenChanged(id) }, registry, log.With("duty", cmd.Name()))
	if err != nil {
		return err
	}
	refresher, err = cluster.NewRefresher(cluster.RefreshConfig{
		Sources: f.sources, Target: f.target[0], ECRSources: ecrSources{}, Tokens: tokens,
		Client: client, Metrics: impsync.NewMetrics(registry), Log: log,
	})
	if err != nil {
		return err
	}
	return f.serve(cmd.Context(), []duty{refresher, tokens}, registry, log, "sources", f.sources.String(), "target", f.target.String())
}
