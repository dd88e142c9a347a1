package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	coordinationv1client "k8s.io/client-go/kubernetes/typed/coordination/v1"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// UninstallConfig is what Uninstall needs.
type UninstallConfig struct {
	// Namespace holds the Lease of the coordinators.
	Namespace string
	// DryRun: nothing is changed.
	DryRun bool
	// Client is the connection to the API server, with the rights of whoever asks.
	Client *rest.Config
	// Note is told what is worth a look.
	Note func(string)
	// Done is told of each ServiceAccount, in no order, as it is done.
	Done func(Detached)
}

// Detached is a ServiceAccount from which entries were taken, or would be in a dry run.
type Detached struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
	// Secrets are the names that it named for imps.
	Secrets []string `json:"secrets"`
	// Error is why it could not be changed, empty where it was.
	Error string `json:"error,omitempty"`
}

// ErrCoordinatorLeads says that a coordinator is at work, which would do everything again.
var ErrCoordinatorLeads = errors.New("a coordinator is at work")

// pageSize is how many ServiceAccounts are listed at once.
const pageSize = 500

// Uninstall takes out of all ServiceAccounts what imps has put there. An error of a single one keeps it from none of the
// others, and is told in the end.
func Uninstall(ctx context.Context, config UninstallConfig) error {
	core, err := corev1client.NewForConfig(impsync.Protobuf(config.Client))
	if err != nil {
		return fmt.Errorf("client: %w", err)
	}
	leases, err := coordinationv1client.NewForConfig(config.Client)
	if err != nil {
		return fmt.Errorf("client: %w", err)
	}
	ever, err := nobodyLeads(ctx, leases, config.Namespace)
	if err != nil {
		return err
	}
	if !ever {
		config.Note(fmt.Sprintf("there is no Lease %s/%s: if a coordinator runs in another namespace, it does everything again; give --namespace then", config.Namespace, LeaseName))
	}
	failed := 0
	options := metav1.ListOptions{Limit: pageSize}
	for {
		list, err := core.ServiceAccounts("").List(ctx, options)
		if err != nil {
			return fmt.Errorf("list ServiceAccounts: %w", err)
		}
		for i := range list.Items {
			a := &list.Items[i]
			if len(accountOf(a).attached) == 0 {
				continue
			}
			done := Detached{Namespace: a.Namespace, ServiceAccount: a.Name, Secrets: accountOf(a).attached}
			if err := detach(ctx, core, config.DryRun, a); err != nil {
				done.Error = impsync.Explain(err)
				failed++
			}
			config.Done(done)
		}
		if options.Continue = list.Continue; options.Continue == "" {
			break
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d ServiceAccounts could not be changed", failed)
	}
	return nil
}

// nobodyLeads returns ErrCoordinatorLeads where the Lease is held, and whether there is a Lease.
func nobodyLeads(ctx context.Context, leases coordinationv1client.LeasesGetter, namespace string) (ever bool, err error) {
	lease, err := leases.Leases(namespace).Get(ctx, LeaseName, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read the Lease %s/%s: %w", namespace, LeaseName, err)
	}
	s := lease.Spec
	if s.HolderIdentity == nil || *s.HolderIdentity == "" || s.RenewTime == nil || s.LeaseDurationSeconds == nil {
		return true, nil
	}
	if ends := s.RenewTime.Add(time.Duration(*s.LeaseDurationSeconds) * time.Second); time.Now().Before(ends) {
		return true, fmt.Errorf("%w, %s, and would do everything again: scale it to 0 first (kubectl --namespace %s scale deployment imps-coordinator --replicas=0); a Lease that nobody renews ends by itself at %s",
			ErrCoordinatorLeads, *s.HolderIdentity, namespace, ends.UTC().Format(time.RFC3339))
	}
	return true, nil
}

// detach takes out of a ServiceAccount what imps has put there.
func detach(ctx context.Context, core corev1client.ServiceAccountsGetter, dryRun bool, a *corev1.ServiceAccount) error {
	accounts := core.ServiceAccounts(a.Namespace)
	options := metav1.PatchOptions{FieldManager: impsync.FieldManager}
	if dryRun {
		options.DryRun = []string{metav1.DryRunAll}
	}
	first := true
	err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
		if !first {
			var err error
			if a, err = accounts.Get(ctx, a.Name, metav1.GetOptions{}); err != nil {
				return err
			}
		}
		first = false
		change := &attachment{was: accountOf(a)}
		if len(change.was.attached) == 0 {
			return nil
		}
		change.names, _ = attach(change.was.pullSecrets, change.was.attached, nil, func(string) bool { return false })
		patch, err := change.patch()
		if err != nil {
			return err
		}
		_, err = accounts.Patch(ctx, a.Name, types.MergePatchType, patch, options)
		return err
	})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
